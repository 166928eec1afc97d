"""Writing a traced module as an ONNX file that has been run and compared before it gets its name."""

from __future__ import annotations

import ast
import os
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from onnxscript.optimizer import FOLDED_FROM_KEY
from torch.onnx import ONNXProgram

from fxprune.errors import ArgumentError
from fxprune.files import atomic
from fxprune.graph.traced import TracedModule

from .comparison import Call, ModuleRunner, as_calls
from .divergence import ORIGIN
from .lowering import lower
from .precision import float16, int8
from .precision import sparse as store_sparse
from .session import RTOL, Session, as_captured
from .source import FileReport, check_source, flat, metadata, resized, size_of, translating, verifying

SINGLE_FILE_BYTES = 1536 * 2**20  # weights beyond it go to a file beside: protobuf ends at 2 GiB


@dataclass(frozen=True)
class ExportReport(FileReport):
    """What `to_onnx` wrote.

    Attributes:
        path, size, comparison: as in `FileReport`. opset: of ONNX's own operators.
        inputs, outputs: names in the file, in order.
        precision: of its weights. dense_size: bytes without sparse initializers, `size` where there are none.
        notes: what the caller should know of the file.
    """

    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    precision: str
    dense_size: int
    notes: tuple[str, ...]


def to_onnx(
    final: TracedModule,
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    precision: Literal["float32", "float16", "int8"] = "float32",
    calibration: Any = None,
    sparse: bool = False,
    verify: bool = True,
    keep_io: bool = True,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    dynamic_shapes: Any = "captured",
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    inputs: Any = (),
    rtol: float | None = None,
    atol: float | None = None,
) -> ExportReport:
    """Write the eval graph of a traced module as an ONNX file, through `torch.onnx.export(dynamo=True)`.

    The file is checked by onnx, run in onnxruntime on the sample inputs, again for every free size at another value
    (a free batch also at 1), and compared with `final` in eval mode; only then it is renamed to `path`. Initializers
    have the names of the state dict. Weights beyond 1.5 GiB go to `<stem>-<random>.onnx.data` beside it; that of a
    file that is replaced is removed. `final` stays as it is, its mode included. Attention is written as products and
    a softmax, of any rank and without a mask that hides nothing; that of four axes is ONNX's own operator where `opset`
    is 23 or more.

    The file says in its metadata which version wrote it, in which precision, from what (a SHA-256 over graph and
    state), and what `final.plan` removed; each node names the traced node it computes as `fxprune.node`.

    Args:
        final: a traced module with an eval graph, finalized or not.
        path: the file to write.
        opset: ONNX operator set; None: the one torch's exporter prefers.
        precision: "float32" leaves the types as they are; "float16" (onnxruntime.transformers.float16) and "int8"
            (onnxruntime.quantization) are held to an error of 1e-2 and 0.1 of an output's largest value.
        calibration: for "int8", batches like the data to come, in the forms that `compare` takes: static quantization
            of weights and activations, verified on these batches. None: dynamic quantization of the weights.
        sparse: store weights as sparse initializers where these are smaller (float32: below a third non-zero).
        verify: False skips the run in onnxruntime.
        keep_io: leave inputs and outputs float32 in a file of precision "float16".
        providers: onnxruntime's, for the verification.
        dynamic_shapes: "captured" keeps the axes free that are free in the capture; None fixes all; else
            `torch.export`'s structure.
        input_names: one per tensor input; None: the names of the forward's arguments, as in `x`, `batch_ids`.
        output_names: one per tensor output; None: their paths, as in `logits`, `output_0`; `output` if there is one.
        inputs: more inputs to verify on, as for `compare`.
        rtol, atol: as for `compare`.

    Raises:
        ExportError: torch cannot translate an operator, the path cannot be written, or the file computes something
            else: then it is kept as `<stem>.mismatch.onnx`.
        ArgumentError: names, opset, precision or calibration that cannot be used.
        InputError: calibration batches have another structure, shape or type than the model's inputs.
        ArgumentTypeError: `final` is no traced module.

    Example:
        >>> traced = fxprune.trace(torch.nn.Linear(4, 2), (torch.randn(2, 4),))
        >>> fxprune.export.to_onnx(traced, "linear.onnx").comparison.ok
        True
    """
    check_source(final, "to_onnx")
    batches = _batches(final, precision, calibration)
    sample, extra = Call(final.example_args, final.example_kwargs), as_calls(inputs) if inputs != () else []
    shapes = final.dynamic_shapes if dynamic_shapes == "captured" else dynamic_shapes
    with atomic(path) as name:
        stale = _side_files(Path(os.path.realpath(path)))
        module, names, aliases = flat(final)
        lower(module, opset)
        with translating("translate the model to ONNX"):
            exported = torch.export.export(module, *sample, dynamic_shapes=shapes, strict=False)
            program = torch.onnx.export(exported, dynamo=True, verbose=False, opset_version=opset)
        assert isinstance(program, ONNXProgram)
        reached = program.model.opset_imports[""]
        if opset not in (None, reached):
            raise ArgumentError(f"opset {opset} was asked for; torch and onnx can write this model in opset {reached}.")
        _name_weights(program, aliases)
        _name_origins(program)
        _name_ends(program, names, input_names, output_names)
        program.model.metadata_props.update(metadata(final, precision))
        _save(program, name)
        comparison, notes = None, []
        with verifying(name, path) as check:
            if precision == "float16":
                _rewrite(name, lambda model: float16(model, keep_io))
            elif precision == "int8":
                feeds = [Session(name).feed(*batch) for batch in batches] or None
                _rewrite(name, lambda model: int8(name, feeds))
            dense = size_of(name)
            if sparse:
                _rewrite(name, store_sparse)
                count = len(onnx.load(name, load_external_data=False).graph.sparse_initializer)
                notes.append(
                    f"{count} initializers are stored sparse: {size_of(name)} bytes instead of {dense}. onnxruntime "
                    "makes them dense when it loads the file: latency is that of the dense file."
                )
            onnx.checker.check_model(os.fspath(name))
            if verify:
                first = batches[0] if batches else sample
                calls = [*(batches or [sample]), *resized(exported, first, final), *extra]
                session = Session(name, providers)
                comparison = check([ModuleRunner(final, "eval"), session], calls, rtol, atol)
                if set(session.placement) - {providers[0]}:
                    notes.append(f"operators by provider: {session.placement}")
        size = size_of(name)
    for part in stale:
        part.unlink(missing_ok=True)
    taken, given = ([str(v.name) for v in ends] for ends in (program.model.graph.inputs, program.model.graph.outputs))
    return ExportReport(
        Path(path), size, comparison, reached, tuple(taken), tuple(given), precision, dense, tuple(notes)
    )  # fmt: skip


def _batches(final: TracedModule, precision: str, calibration: Any) -> list[Call]:
    given = calibration is not None
    if precision not in RTOL or (given and precision != "int8"):
        asked = f"precision {precision!r} was asked for{' with calibration' * given}"
        raise ArgumentError(f"{asked}; there are {', '.join(RTOL)}, and calibration is for int8.")
    single = isinstance(calibration, tuple | dict | torch.Tensor)
    found = as_calls(calibration if single else list(calibration)) if given else []
    if given and not found:
        raise ArgumentError("calibration holds no batch; at least one is needed, or None for dynamic quantization.")
    found = [Call(*as_captured(final.graphs["eval"], *call)) for call in found]
    for call in found:
        final.check_inputs(*call)
    return found


def _rewrite(name: Path, change: Callable[[onnx.ModelProto], onnx.ModelProto]) -> None:
    """Replace the file by what `change` makes of it; its metadata stay."""
    model = onnx.load(name)
    kept = {entry.key: entry.value for entry in model.metadata_props}
    origins = {
        value: e for node in model.graph.node for e in node.metadata_props for value in node.output if e.key == ORIGIN
    }
    model = change(model)
    for node in model.graph.node:
        if not node.metadata_props:  # what the quantizer puts in its place has none
            node.metadata_props.extend(origins[value] for value in node.output if value in origins)
    onnx.helper.set_model_props(model, kept)
    for part in list(name.parent.iterdir()):
        part.unlink()
    external = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > SINGLE_FILE_BYTES
    side = f"{name.stem}-{secrets.token_hex(4)}.onnx.data"
    onnx.save(model, name, save_as_external_data=external, location=side)


def _name_weights(program: ONNXProgram, aliases: dict[str, str]) -> None:
    """Give the initializers the names of the state dict, also what the optimizer made of a single parameter."""
    graph = program.model.graph
    for name, value in list(graph.initializers.items()):
        origin = {name, *ast.literal_eval(value.metadata_props.get(FOLDED_FROM_KEY, "[]"))} & aliases.keys()
        if len(origin) == 1 and (source := aliases[origin.pop()]) not in graph.initializers:
            value.name = source
    for node in graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # absolute paths of this machine's sources


def _name_origins(program: ONNXProgram) -> None:
    """Let each node say which traced node's value it computes; of a decomposed one that is the last."""
    assert program.exported_program is not None
    origins = {n.name: n.meta.get("custom", {}).get(ORIGIN) for n in program.exported_program.graph.nodes}
    last = {origins.get(str(value.name)): node for node in program.model.graph for value in node.outputs}
    for origin, node in last.items():
        if origin:
            node.metadata_props[ORIGIN] = origin


def _name_ends(
    program: ONNXProgram, defaults: list[str], inputs: Sequence[str] | None, outputs: Sequence[str] | None
) -> None:
    graph = program.model.graph
    weights = set(graph.initializers) - {value.name for value in graph.outputs}
    inputs = inputs or [str(value.name) for value in graph.inputs]
    if outputs is None:
        clash = weights.union(inputs)
        outputs = [name + "_out" * (name in clash or name in defaults[:i]) for i, name in enumerate(defaults)]
    names, ends = [*inputs, *outputs], [*graph.inputs, *graph.outputs]
    fits = len(inputs) == len(graph.inputs) and len(names) == len(ends) == len(set(names))
    if not fits or weights.intersection(names):
        raise ArgumentError(
            f"input_names {list(inputs)} and output_names {list(outputs)} cannot be used: the model has "
            f"{len(graph.inputs)} inputs and {len(graph.outputs)} outputs, and names must differ from each other and "
            f"from the parameters' ({', '.join(sorted(weights.intersection(names))) or 'as they do'})."
        )
    inner = [value for node in graph.all_nodes() for value in node.outputs if value.name in names]
    for i, value in enumerate([*inner, *ends]):
        value.name = f"fxprune_{i}"  # first out of each other's way
    for value, name in zip(ends, names, strict=True):
        value.name = name
    free: dict[Any, str] = {}
    for value in graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            if re.fullmatch(r"[su]\d+", str(size)) and str(size) not in free:
                free[str(size)] = "batch" if axis == 0 and "batch" not in free.values() else f"{value.name}_{axis}"
    program.rename_axes(free)


def _save(program: ONNXProgram, name: Path) -> None:
    weights = sum(v.const_value.nbytes for v in program.model.graph.initializers.values() if v.const_value is not None)
    external = weights > SINGLE_FILE_BYTES
    # the exporter calls the side file like the main one; a fresh name keeps an older pair whole until it is replaced
    draft = name.with_name(f"{name.stem}-{secrets.token_hex(4)}.onnx") if external else name
    program.save(draft, external_data=external)
    draft.rename(name)


def _side_files(path: Path) -> list[Path]:
    """External data of a file that stands at `path`, as far as `_save` has named it."""
    own = re.compile(re.escape(path.stem) + r"-[0-9a-f]{8}\.onnx\.data")
    found = [item for item in path.parent.iterdir() if own.fullmatch(item.name)]
    if not found or not path.is_file():
        return []
    try:
        tensors = onnx.load(os.fspath(path), load_external_data=False).graph.initializer
    except Exception:  # what stands there is not ONNX: nothing of it is known to be ours
        return []
    used = {entry.value for tensor in tensors for entry in tensor.external_data}
    return [item for item in found if item.name in used]
