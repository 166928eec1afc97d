"""Writing a traced module as an ONNX file that has been run and compared before it gets its name."""

from __future__ import annotations

import ast
import contextlib
import keyword
import logging
import operator
import os
import re
import secrets
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.utils._pytree as pytree
from onnxscript.optimizer import FOLDED_FROM_KEY
from torch import fx
from torch.export import ExportedProgram
from torch.onnx import ONNXProgram

from fxprune.errors import ArgumentError, ArgumentTypeError, CompareError, ExportError, FinalizeError, FxpruneError
from fxprune.files import atomic
from fxprune.graph import erase_dead, evaluate
from fxprune.reparametrize import tagged
from fxprune.traced import CodeGen, TracedModule

from .compare import Call, ModuleRunner, Report, as_calls, judge
from .session import Session, identifier, named_leaves

SINGLE_FILE_BYTES = 1536 * 2**20  # weights beyond it go to a file beside: protobuf ends at 2 GiB


@dataclass(frozen=True)
class ExportReport:
    """What `to_onnx` wrote.

    Attributes:
        path: the file. size: its bytes, external data included. opset: of ONNX's own operators.
        inputs, outputs: names in the file, in order.
        comparison: the file against its source, per output; None when it was not asked for.
    """

    path: Path
    size: int
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    comparison: Report | None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return asdict(self) | {"path": str(self.path), "comparison": self.comparison and self.comparison.to_dict()}


def to_onnx(
    final: TracedModule,
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    verify: bool = True,
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
    file that is replaced is removed. `final` stays as it is, its mode included.

    Args:
        final: a traced module with an eval graph, finalized or not.
        path: the file to write.
        opset: ONNX operator set; None: the one torch's exporter prefers.
        verify: False skips the run in onnxruntime.
        dynamic_shapes: "captured" keeps the axes free that are free in the capture; None fixes all; else
            `torch.export`'s structure.
        input_names: one per tensor input; None: the names of the forward's arguments, as in `x`, `batch_ids`.
        output_names: one per tensor output; None: their paths, as in `logits`, `output_0`; `output` if there is one.
        inputs: more inputs to verify on, as for `compare`.
        rtol, atol: as for `compare`.

    Raises:
        ExportError: torch cannot translate an operator, the path cannot be written, or the file computes something
            else: then it is kept as `<stem>.mismatch.onnx`.
        ArgumentError: names or opset that cannot be used.
        ArgumentTypeError: `final` is no traced module.

    Example:
        >>> traced = fxprune.trace(torch.nn.Linear(4, 2), (torch.randn(2, 4),))
        >>> fxprune.export.to_onnx(traced, "linear.onnx").comparison.ok
        True
    """
    if not isinstance(final, TracedModule):
        raise ArgumentTypeError(f"to_onnx was given a {type(final).__name__}; it takes what fxprune.trace returns.")
    if "eval" not in final.graphs:
        raise ExportError(f'the module was captured in {final.modes} only. Trace it again with "eval" among its modes.')
    _refuse_nonfinite(final)
    sample, extra = Call(final.example_args, final.example_kwargs), as_calls(inputs) if inputs != () else []
    captured = isinstance(dynamic_shapes, str) and dynamic_shapes == "captured"
    shapes = final.dynamic_shapes if captured else dynamic_shapes
    with atomic(path) as name:
        stale = _side_files(Path(os.path.realpath(path)))
        flat, names, aliases = _flat(final)
        try:
            with _quiet():
                exported = torch.export.export(flat, *sample, dynamic_shapes=shapes, strict=False)
                program = torch.onnx.export(exported, dynamo=True, verbose=False, opset_version=opset)
        except Exception as error:  # whatever torch, onnxscript or an operator's translation raises
            raise ExportError(f"torch cannot translate the model to ONNX: {_causes(error)}") from error
        assert isinstance(program, ONNXProgram)
        reached = program.model.opset_imports[""]
        if opset not in (None, reached):
            raise ArgumentError(f"opset {opset} was asked for; torch and onnx can write this model in opset {reached}.")
        _name_weights(program, aliases)
        _name_ends(program, names, input_names, output_names)
        _save(program, name)
        comparison = None
        try:
            onnx.checker.check_model(os.fspath(name))
            if verify:
                calls = [sample, *_resized(exported, sample, final), *extra]
                comparison = judge([ModuleRunner(final, "eval"), Session(name)], calls, rtol, atol)
        except (onnx.checker.ValidationError, CompareError) as error:
            text = str(error).replace(os.fspath(name), os.fspath(path))
            raise ExportError(f"the exported file cannot be used: {text}") from error
        if comparison and not comparison.ok:
            raise ExportError(
                f"the exported file computes something else than its source; kept as '{_keep_aside(name, Path(path))}'."
                f"\n{comparison.table()}"
            )
        size = sum(part.stat().st_size for part in name.parent.iterdir())
    for part in stale:
        part.unlink(missing_ok=True)
    taken, given = ([str(v.name) for v in ends] for ends in (program.model.graph.inputs, program.model.graph.outputs))
    return ExportReport(Path(path), size, reached, tuple(taken), tuple(given), comparison)


def _refuse_nonfinite(module: TracedModule) -> None:
    # a buffer may hold -inf on purpose (an attention mask), never NaN
    bad = [n for n, p in module.named_parameters() if not p.isfinite().all()]
    bad += [n for n, b in module.named_buffers() if b.isnan().any()]
    if bad:
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise ExportError(f"NaN or inf in {', '.join(bad[:10])}{more}: refused, since it would spread. Train again.")


def _flat(final: TracedModule) -> tuple[fx.GraphModule, list[str], dict[str, str]]:
    """The eval graph with reparametrizations folded and a plain tuple of tensors as its output.

    Besides: names for the outputs, and the targets that had to be renamed, since torch generates code from them and
    a module may be called `class`.

    torch's exporter drops None, fails on numbers, and gives one ONNX value to an output that is returned twice, is
    an input or a parameter; renaming one of those would rename the other.
    """
    source, graph = final.graphs["eval"], fx.Graph()
    info = source._codegen.pytree_info  # type: ignore[attr-defined]
    leaves = pytree.tree_leaves(graph.graph_copy(source, {}))
    paths = [path for path, _ in named_leaves(pytree.tree_unflatten(range(len(leaves)), info.out_spec))]
    values: dict[fx.Node, str] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        if isinstance(leaf, int | float):
            kind = torch.tensor(leaf).dtype
            leaf = graph.call_function(torch.ops.aten.scalar_tensor.default, (leaf,), {"dtype": kind})
        elif isinstance(leaf, fx.Node) and (leaf in values or leaf.op != "call_function"):
            leaf = graph.call_function(torch.ops.aten.clone.default, (leaf,))
        if isinstance(leaf, fx.Node):
            values[leaf] = identifier(path, "output")
    graph.output(tuple(values))
    graph.set_codegen(CodeGen(info._replace(out_spec=pytree.tree_structure(tuple(values)))))
    folded: dict[str, torch.Tensor] = {}
    for node in reversed(tagged(graph)):
        # without users, what it was part of is folded already; what depends on an input stays an expression
        with contextlib.suppress(FinalizeError), graph.inserting_before(node):
            if node.users:
                name = str(node.meta["fxprune"]["parameter"])
                folded[name] = evaluate(final, node)
                node.replace_all_uses_with(graph.get_attr(name))
                erase_dead(graph)
    root, aliases = dict[str, Any](), dict[str, str]()
    for node in graph.find_nodes(op="get_attr"):
        target = str(node.target)
        node.target = ".".join(part + "_" * keyword.iskeyword(part) for part in target.split("."))
        root[node.target] = folded[target] if target in folded else operator.attrgetter(target)(final)
        aliases[node.target] = target
    module = fx.GraphModule(root, graph)
    module.training = False
    return module, list(values.values()), aliases


def _name_weights(program: ONNXProgram, aliases: dict[str, str]) -> None:
    """Give the initializers the names of the state dict, also what the optimizer made of a single parameter."""
    graph = program.model.graph
    for name, value in list(graph.initializers.items()):
        origin = {name, *ast.literal_eval(value.metadata_props.get(FOLDED_FROM_KEY, "[]"))} & aliases.keys()
        if len(origin) == 1 and (source := aliases[origin.pop()]) not in graph.initializers:
            value.name = source
    for node in graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # absolute paths of this machine's sources


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
    found = {item.name: item for item in path.parent.iterdir() if own.fullmatch(item.name)}
    if not found or not path.is_file():
        return []
    try:
        tensors = onnx.load(os.fspath(path), load_external_data=False).graph.initializer
    except Exception:  # what stands there is not ONNX: nothing of it is known to be ours
        return []
    return [found[e.value] for e in {e.value: e for t in tensors for e in t.external_data}.values() if e.value in found]


def _keep_aside(name: Path, path: Path) -> Path:
    aside = path.with_name(f"{path.stem}.mismatch.onnx")
    with atomic(aside) as kept:
        for part in list(name.parent.iterdir()):
            part.rename(kept if part.name == name.name else kept.with_name(part.name))
    return aside


def _resized(exported: ExportedProgram, call: Call, final: TracedModule) -> list[Call]:
    """The sample with every free size one larger, and with free batches of 1, as far as `final` runs on these."""
    keywords = exported.call_spec.in_spec.child(1).context  # in the order of the signature
    leaves, spec = pytree.tree_flatten((call.args, {name: call.kwargs[name] for name in keywords}))
    nodes = list(exported.graph.find_nodes(op="placeholder"))
    values = [node.meta["val"] for node in nodes[len(nodes) - len(leaves) :]]
    tensors = [(i, v) for i, v in enumerate(values) if isinstance(v, torch.Tensor)]
    shapes: list[tuple[int, int, Any]] = [(i, a, size) for i, v in tensors for a, size in enumerate(v.shape)]
    axes = [(i, a, size.node.expr) for i, a, size in shapes if isinstance(size, torch.SymInt)]
    sizes = {expr: leaves[i].shape[a] for i, a, expr in axes if expr.is_Symbol}
    allowed = exported.range_constraints
    larger = {s: n + 1 if n + 1 <= allowed[s].upper else n for s, n in sizes.items()}
    # torch.export gives 2 as the lowest size that it treats as free; 1 works too in most models
    single = {s: 1 for s in sizes if allowed[s].lower <= 2 and any(e == s and a == 0 for _, a, e in axes)}
    calls = []
    for new in filter(None, (larger, single)):
        fresh: dict[int, torch.Tensor] = {}  # by identity: inputs that were one tensor stay one
        for i, axis, expr in axes:
            leaf = fresh.get(id(leaves[i]), leaves[i])
            index = torch.arange(int(expr.subs({**sizes, **new})), device=leaf.device) % max(leaf.shape[axis], 1)
            fresh[id(leaves[i])] = leaf.index_select(axis, index)
        changed = Call(*pytree.tree_unflatten([fresh.get(id(leaf), leaf) for leaf in leaves], spec))
        with contextlib.suppress(FxpruneError):
            ModuleRunner(final, "eval").run(*changed)
            calls.append(changed)
    return calls


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the deprecations that torch and onnxscript cause each other, and the exporter's progress."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning):
                warnings.filterwarnings("ignore", category=category, module=r"(torch|onnx\w*|copyreg)(\.|$)")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _causes(error: BaseException | None) -> str:
    chain = []
    while error:
        chain.append(re.sub(r"\x1b\[\d+m", "", f"{type(error).__name__}: {error}"))
        error = error.__cause__
    return "; ".join(chain[1:] or chain)  # the first of several only says where to report
