"""Writing a traced module as an ONNX file that has been run and compared before it gets its name."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.onnx import ONNXProgram

from fxprune.calling import is_no_function, named_arguments
from fxprune.capture.caches import without_foreign_caches
from fxprune.errors import ArgumentError, ArgumentTypeError, CompareError, ExportError
from fxprune.files import atomic, check_suffix
from fxprune.graph.calls import Call, as_calls
from fxprune.graph.masks import masked
from fxprune.graph.mutation import written_state
from fxprune.graph.requirements import require_list
from fxprune.graph.spread_modules import lent_to_first
from fxprune.graph.traced import TracedModule
from fxprune.progress import shown
from fxprune.reports import counted
from fxprune.torch_internals import any_recurrent_length

from . import upcast
from .at_hand import nothing_learned, program_at_hand, program_of_capture
from .batch_norms import optimize_lent, optimize_narrow
from .flattening import check_source, flatten, take_as_given
from .int8 import int8
from .lowering import lower
from .metadata import captured_sizes, metadata
from .onnx_files import is_sharded, rewrite, save, side_files
from .onnx_names import (
    drop_stack_traces,
    keep_lost_initializers,
    name_ends,
    name_free_sizes,
    name_origins,
    name_weights,
)
from .precision import float16, sparse_initializers
from .report import Report
from .runners import ModuleRunner
from .session import PRECISION_TOLERANCES, Session
from .translation import translating, translations
from .values import as_captured, captured_names
from .verification import Draft, FileReport, Proof, other_sizes, verified


@dataclass(frozen=True, repr=False)
class ExportReport(FileReport):
    """What `to_onnx` wrote.

    Attributes:
        path, size, comparison, notes: as in `FileReport`. opset: of ONNX's own operators.
        inputs, outputs: names in the file, in order.
        precision: of its weights. dense_size: bytes without sparse initializers, `size` where there are none.
        seconds: what all of it took. verification_seconds: what of that was its run and the comparison.
    """

    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    precision: str
    dense_size: int
    seconds: float
    verification_seconds: float

    _runtime: ClassVar[str] = "onnxruntime"

    def _verdict(self) -> str:
        if self.comparison is None:
            return super()._verdict()
        return f"{super()._verdict()}; that took {self.verification_seconds:.1f} s of {self.seconds:.1f}"

    def _kind(self) -> tuple[str, ...]:
        sparse = () if self.dense_size == self.size else (f"{self.dense_size:,} without sparse initializers",)
        return (f"opset {self.opset}", self.precision, *sparse)


@named_arguments
@lent_to_first()
@shown("write ONNX")
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
    inputs: Any = None,
    rtol: float | None = None,
    atol: float | None = None,
) -> ExportReport:
    """Write the eval graph of a traced module as an ONNX file, through `torch.onnx.export(dynamo=True)`.

    The file is checked by onnx, run in onnxruntime on the sample inputs, again for every free size at another value
    (a free batch also at 1), and compared with `final` in eval mode; only then it is renamed to `path`.
    Initializers have the names of the state dict. Weights beyond 1.5 GiB, of a sharded module beyond 32 MiB, go to
    `<stem>-<random>.onnx.data` beside it; that of a file that is replaced is removed. `final` stays as it is, its
    mode included. Attention is written as products and a softmax, of any rank and without a mask that hides
    nothing; that of four axes is ONNX's own operator where `opset` is 23 or more. The graph is captured again only
    where `dynamic_shapes` are others, or where it writes into tensors, has branches, or holds what torch translates
    of a capture alone.

    The file says in its metadata which version wrote it, in which precision, from what (a SHA-256 over graph and
    state), and what `final.plan` removed; each node names the traced node it computes as `fxprune.node`.

    Args:
        final: a traced module with an eval graph, finalized or not.
        path: the file to write, `.onnx`.
        opset: ONNX operator set; None: the one torch's exporter prefers.
        precision: "float32" leaves the types as they are, also bfloat16; "float16" (onnxruntime.transformers.float16)
            and "int8" (onnxruntime.quantization) are held to an error of 1e-2 and 0.1 of an output's largest value.
        calibration: for "int8", batches like the data to come, without labels, in the forms that `compare` takes:
            static quantization of weights and activations, verified on these batches. None: dynamic quantization of the
            weights.
        sparse: store weights as sparse initializers where these are smaller (float32: below a third non-zero).
        verify: False skips the run in onnxruntime.
        keep_io: leave inputs and outputs float32 in a file of precision "float16".
        providers: onnxruntime's, for the verification.
        dynamic_shapes: "captured" keeps the axes free that are free in the capture; None fixes all; else
            `torch.export`'s structure.
        input_names: one per tensor input; None: the names of the forward's arguments, as in `x`, `batch_ids`; of
            transformers' caches `past_key_values.0.key`, as optimum has it.
        output_names: one per tensor output; None: their paths, as in `logits`, `output_0`; `output` if there is one; of
            caches `present.0.key`.
        inputs: more inputs to verify on, in the forms that `compare` takes; None: none.
        rtol, atol: as for `compare`.

    Raises:
        ExportError: torch cannot translate an operator, the path cannot be written, or the file computes something
            else: then it is kept as `<stem>.mismatch.onnx`.
        ArgumentError: names, opset, precision or calibration that cannot be used.
        InputError: calibration batches have another structure, shape or type than the model's inputs.
        SuffixError: the path ends otherwise. ArgumentTypeError: `final` is no traced module.

    Example:
        >>> traced = fxprune.trace(torch.nn.Linear(4, 2), (torch.randn(2, 4),))
        >>> fxprune.export.to_onnx(traced, "linear.onnx").comparison.ok
        True
    """
    check_source(final, "to_onnx")
    check_suffix(path, ".onnx", what="written by to_onnx")
    if opset is not None and (isinstance(opset, bool) or not isinstance(opset, int)):
        raise ArgumentTypeError(f"opset={opset!r}: a number such as 18 is needed, or None for torch's own choice.")
    for name, strings in (("providers", providers), ("input_names", input_names), ("output_names", output_names)):
        require_list(name, strings)
    if isinstance(dynamic_shapes, str) and dynamic_shapes != "captured":
        raise ArgumentError(
            f'dynamic_shapes={dynamic_shapes!r}: "captured", None or torch.export\'s structure is needed. '
            "A free batch is asked for when the model is traced."
        )
    request = _Request(
        final,
        opset=opset,
        precision=precision,
        calibration=tuple(_calibration_batches(final, precision, calibration)),
        sparse=sparse,
        keep_io=keep_io,
        providers=tuple(providers),
        dynamic_shapes=final.dynamic_shapes if dynamic_shapes == "captured" else dynamic_shapes,
        input_names=input_names,
        output_names=output_names,
        proof=Proof.of(verify, inputs, rtol, atol),
    )
    start = time.perf_counter()
    with atomic(path) as file:
        draft = Draft(file, path)
        stale = side_files(path)
        translation = _translate(request)
        with draft.usable():
            save(translation.program, file)
            written = _convert(request, draft)
            verification = (
                _verify(request, draft, translation.exported)
                if request.proof.is_wanted
                else _Verification(None, (), seconds=0.0)
            )
        size = draft.size
    for part in stale:
        part.unlink(missing_ok=True)
    return ExportReport(
        Path(path),
        size,
        verification.comparison,
        (*_masks_left(final), *_state_left(final), *translation.notes, *written.notes, *verification.notes),
        opset=translation.opset,
        inputs=translation.inputs,
        outputs=translation.outputs,
        precision=precision,
        dense_size=written.dense_size,
        seconds=time.perf_counter() - start,
        verification_seconds=verification.seconds,
    )


def _masks_left(final: TracedModule) -> tuple[str, ...]:
    """What to say of a module that was not finalized, or whose schedule was not used."""
    told = tuple(final.told_unused())
    if not (names := masked(final)):
        return told
    return (
        *told,
        f"{counted(len(names), 'parameter')} of the module have masks, and what these made dead is still in the file: "
        "fxprune.finalize takes it out, and returns the module to export",
    )


def _state_left(final: TracedModule) -> tuple[str, ...]:
    """What to say of buffers that a call changes."""
    if not (names := written_state(final.graphs["eval"])):
        return ()
    return (
        f"each call of the module writes into {', '.join(names)}; an ONNX file keeps nothing from run to run: each is "
        "the module's next call",
    )


@dataclass(frozen=True)
class _Request:
    """What `to_onnx` was asked for, checked: its arguments, as it says there."""

    final: TracedModule
    opset: int | None
    precision: str
    calibration: tuple[Call, ...]
    sparse: bool
    keep_io: bool
    providers: tuple[str, ...]
    dynamic_shapes: Any
    input_names: Sequence[str] | None
    output_names: Sequence[str] | None
    proof: Proof

    @property
    def sample(self) -> Call:
        """The sample inputs of the capture."""
        return Call(self.final.example_args, self.final.example_kwargs)


@dataclass(frozen=True)
class _Translation:
    """What torch made: its exported program, and the ONNX program under the names of the file."""

    exported: ExportedProgram
    program: ONNXProgram
    notes: tuple[str, ...] = ()

    @property
    def opset(self) -> int:
        """Of ONNX's own operators."""
        return int(self.program.model.opset_imports[""])

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names in order."""
        return tuple(str(value.name) for value in self.program.model.graph.inputs)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names in order."""
        return tuple(str(value.name) for value in self.program.model.graph.outputs)


@dataclass(frozen=True)
class _Written:
    """The file in its final precision.

    Attributes:
        dense_size: its bytes before weights were stored sparse. notes: what that came to.
    """

    dense_size: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Verification:
    """What the run of the file gave, None where none was asked for."""

    comparison: Report | None
    notes: tuple[str, ...]
    seconds: float


def _calibration_batches(final: TracedModule, precision: str, calibration: Any) -> list[Call]:
    given = calibration is not None
    if precision not in PRECISION_TOLERANCES or (given and precision != "int8"):
        asked = f"precision {precision!r} was asked for{' with calibration' if given else ''}"
        raise ArgumentError(f"{asked}; there are {', '.join(PRECISION_TOLERANCES)}, and calibration is for int8.")
    if precision != "float32" and upcast.holds_bfloat16(final.graphs["eval"]):
        raise ArgumentError(
            f"precision {precision!r} was asked for of a module that computes in bfloat16; it is made of float32. "
            'Leave precision="float32", which keeps every type, or trace the model in float32.'
        )
    if not given:
        return []
    batches = as_calls(calibration, error=CompareError, where=" among the calibration batches")
    if not batches:
        raise ArgumentError("calibration holds no batch; at least one is needed, or None for dynamic quantization.")
    batches = [as_captured(final.graphs["eval"], batch) for batch in batches]
    for batch in batches:
        final.check_inputs(*batch)
    return batches


def _translate(request: _Request) -> _Translation:
    """The eval graph as an ONNX program, every name in it as it will be in the file."""
    flat = flatten(request.final)
    lower(flat.module, request.opset)
    sample = Call(*without_foreign_caches(tuple(request.sample)))
    take_as_given(flat.module, sample)
    translation = _translation_of_module(request, flat.module, sample)
    program = translation.program
    if request.opset not in (None, translation.opset):
        raise ArgumentError(
            f"opset {request.opset} was asked for; torch and onnx can write this model in opset {translation.opset}."
        )
    keep_lost_initializers(program)
    name_weights(program, flat.parameters)
    name_origins(program)
    names = request.input_names or _input_names(program, captured_names(request.final.graphs["eval"], request.sample))
    name_ends(program, flat.output_names, names, request.output_names)
    name_free_sizes(program)
    drop_stack_traces(program)
    program.model.metadata_props.update(metadata(request.final, request.precision))
    program.model.metadata_props.update(captured_sizes(program, request.sample))
    return translation


def _translation_of_module(request: _Request, module: fx.GraphModule, sample: Call) -> _Translation:
    """What torch makes of the graph as it was captured for `final`, or of it captured once more."""
    if request.dynamic_shapes is not request.final.dynamic_shapes:
        return _translation_of_a_capture(request, module, sample)
    try:
        return _translation_at_hand(request, module)
    except ExportError as error:  # a capture meets it again, and says so, or gets around it
        translation = _translation_of_a_capture(request, module, sample)
        return replace(translation, notes=(f"the graph was captured once more: {str(error).splitlines()[0]}",))


def _translation_at_hand(request: _Request, module: fx.GraphModule) -> _Translation:
    exported = program_at_hand(module)
    with nothing_learned(exported), translating("translate the model to ONNX"), any_recurrent_length():
        return _translation_of(request, exported)


def _translation_of_a_capture(request: _Request, module: fx.GraphModule, sample: Call) -> _Translation:
    with translating("translate the model to ONNX"):
        exported = program_of_capture(module, sample, request.dynamic_shapes)
        return _translation_of(request, exported)


def _translation_of(request: _Request, exported: ExportedProgram) -> _Translation:
    is_narrow = upcast.holds_bfloat16(exported.graph)
    opset = upcast.OPSET if is_narrow and request.opset is None else request.opset
    table = translations(exported.graph)
    program = torch.onnx.export(
        exported, dynamo=True, verbose=False, opset_version=opset, custom_translation_table=table, optimize=False
    )
    assert isinstance(program, ONNXProgram)
    if is_narrow:
        optimize_narrow(program)
    elif is_sharded(program):
        optimize_lent(program)
    else:
        program.optimize()
    return _Translation(exported, program)


def _input_names(program: ONNXProgram, of_caches: Sequence[str | None]) -> list[str] | None:
    """The captured names, and for what caches hold those of its layers; None where torch took other inputs."""
    captured = [str(value.name) for value in program.model.graph.inputs]
    if len(captured) != len(of_caches):
        return None
    return [name or given for given, name in zip(captured, of_caches, strict=True)]


def _convert(request: _Request, draft: Draft) -> _Written:
    """Bring the file to the precision that was asked for, and store it sparse if that was."""
    if request.precision == "float16":
        rewrite(draft, lambda model: float16(model, request.keep_io))
    elif request.precision == "int8":
        rewrite(draft, lambda model: int8(draft.file, _feeds(request, draft)))
    dense_size = draft.size
    if not request.sparse:
        return _Written(dense_size)
    rewrite(draft, lambda model: sparse_initializers(model, draft.file.parent))
    count = len(onnx.load(draft.file, load_external_data=False).graph.sparse_initializer)
    note = (
        f"{count} initializers are stored sparse: {draft.size} bytes instead of {dense_size}. onnxruntime "
        "makes them dense when it loads the file: latency is that of the dense file."
    )
    return _Written(dense_size, (note,))


def _feeds(request: _Request, draft: Draft) -> list[dict[str, np.ndarray]] | None:
    """The calibration batches as the file takes them, None without."""
    if not request.calibration:
        return None
    session = Session(draft.file, packs=False)  # which is not run
    return [session.feed(*batch) for batch in request.calibration]


def _verify(request: _Request, draft: Draft, exported: ExportedProgram) -> _Verification:
    """Run the file on the calibration batches or the sample, on other sizes, and on the caller's inputs."""
    start = time.perf_counter()
    given = request.calibration or (request.sample,)
    others = other_sizes(exported, given[0], request.final)
    calls = [*given, *others.calls, *request.proof.calls]
    notes = list(others.notes)
    session: Session
    if upcast.holds_bfloat16(request.final.graphs["eval"]):
        with upcast.twin(draft.file, request.providers) as session:
            reference: ModuleRunner = upcast.Upcast(request.final, request.opset)
            comparison = verified(draft, reference, session, calls, request.proof.tolerance)
        notes.insert(0, upcast.note(comparison))
    else:
        session = Session(draft.file, request.providers, packs=draft.parts == [draft.file])
        comparison = verified(draft, ModuleRunner(request.final, "eval"), session, calls, request.proof.tolerance)
    if set(session.placement) - {request.providers[0]}:
        notes.append(f"operators by provider: {session.placement}")
    return _Verification(comparison, tuple(notes), time.perf_counter() - start)


is_no_function(__name__, "A file is written by fxprune.export.to_onnx(final, 'model.onnx').")
