"""What the writers share: the graph that is written, what a file says of itself, and how it is verified."""

from __future__ import annotations

import contextlib
import hashlib
import keyword
import logging
import operator
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import onnx
import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.export import ExportedProgram

from fxprune.errors import ArgumentTypeError, CompareError, ExportError, FinalizeError, FxpruneError
from fxprune.files import atomic
from fxprune.graph.editing import erase_dead
from fxprune.graph.expressions import evaluate
from fxprune.graph.reparametrizations import tagged
from fxprune.graph.text import text
from fxprune.graph.traced import CodeGen, TracedModule
from fxprune.version import __version__

from .comparison import Call, ModuleRunner, Report, judge
from .divergence import ORIGIN
from .session import identifier, named_key, named_leaves


@dataclass(frozen=True)
class FileReport:
    """What an export wrote.

    Attributes:
        path: the file. size: its bytes, external data included.
        comparison: the file against its source, per output; None when it was not asked for.
    """

    path: Path
    size: int
    comparison: Report | None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return asdict(self) | {"path": str(self.path), "comparison": self.comparison and self.comparison.to_dict()}


def check_source(module: object, function: str) -> None:
    """Refuse what cannot be exported.

    Raises:
        ArgumentTypeError: no traced module.
        ExportError: it has no eval graph, or NaN or inf among its parameters.
    """
    if not isinstance(module, TracedModule):
        raise ArgumentTypeError(f"{function} was given a {type(module).__name__}; it takes what fxprune.trace returns.")
    if "eval" not in module.graphs:
        raise ExportError(
            f'the module was captured in {module.modes} only. Trace it again with "eval" among the modes.'
        )
    # a buffer may hold -inf on purpose (an attention mask), never NaN
    bad = [n for n, p in module.named_parameters() if not p.isfinite().all()]
    bad += [n for n, b in module.named_buffers() if b.isnan().any()]
    if bad:
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise ExportError(f"NaN or inf in {', '.join(bad[:10])}{more}: refused, since it would spread. Train again.")


def flat(final: TracedModule, structured: bool = False) -> tuple[fx.GraphModule, list[str], dict[str, str]]:
    """The eval graph with reparametrizations folded, and a plain tuple of tensors as its output.

    With `structured`, the output is what it was, in plain containers.

    Besides: names for the outputs, and the targets that had to be renamed, since torch generates code from them and
    a module may be called `class`.

    torch's exporter drops None, fails on numbers, and gives one ONNX value to an output that is returned twice, is
    an input or a parameter; renaming one of those would rename the other.
    """
    source, graph = final.graphs["eval"], fx.Graph()
    info = source._codegen.pytree_info  # type: ignore[attr-defined]
    copies: dict[fx.Node, fx.Node] = {}
    leaves = pytree.tree_leaves(graph.graph_copy(source, copies))
    paths = [path for path, _ in named_leaves(pytree.tree_unflatten(range(len(leaves)), info.out_spec))]
    values: dict[fx.Node, str] = {}
    for path, leaf in zip(paths, leaves if not structured else [], strict=not structured):
        if isinstance(leaf, int | float):
            kind = torch.tensor(leaf).dtype
            leaf = graph.call_function(torch.ops.aten.scalar_tensor.default, (leaf,), {"dtype": kind})
        elif isinstance(leaf, fx.Node) and (leaf in values or leaf.op != "call_function"):
            leaf = graph.call_function(torch.ops.aten.clone.default, (leaf,))
        if isinstance(leaf, fx.Node):
            values[leaf] = identifier(path, "output")
    for original, copied in copies.items():
        copied.meta["custom"] = {ORIGIN: original.name}
    tree: Any = tuple(values)
    if structured:
        tree = _plain(pytree.tree_unflatten(leaves, info.out_spec))
    graph.output(tuple(pytree.tree_leaves(tree)))
    graph.set_codegen(CodeGen(info._replace(out_spec=pytree.tree_structure(tree))))
    aten = torch.ops.aten
    for node in graph.find_nodes(op="call_function", target=aten.contiguous.default) if not structured else ():
        # torch's exporter drops `contiguous` after an attention of one layout, and then meets another layout
        node.target, node.kwargs = aten.clone.default, {"memory_format": torch.contiguous_format, **node.kwargs}
    folded: dict[str, torch.Tensor] = {}
    for node in reversed(tagged(graph)):
        # without users, what it was part of is folded already; what depends on an input stays an expression
        with contextlib.suppress(FinalizeError), graph.inserting_before(node):
            if node.users:
                name = str(node.meta["fxprune"]["parameter"])
                folded[name] = evaluate(final, node)
                read = graph.get_attr(name)
                read.meta["val"] = node.meta["val"]
                node.replace_all_uses_with(read)
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


def _plain(tree: Any) -> Any:
    """A pytree in dicts, lists and tuples, which every reader knows."""
    if isinstance(tree, fx.Node | None | int | float | str):
        return tree
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_plain(v) for v in tree] if isinstance(tree, list) else tuple(_plain(v) for v in tree)
    parts, _ = pytree.tree_flatten_with_path(tree, is_leaf=lambda part: part is not tree)
    return {named_key(path): _plain(part) for path, part in parts}


def resized(exported: ExportedProgram, call: Call, final: TracedModule) -> list[Call]:
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
def quiet() -> Iterator[None]:
    """Without what torch's, onnxscript's and onnxruntime's tools say of each other and of steps done elsewhere."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning):
                warnings.filterwarnings("ignore", category=category, module=r"(torch|onnx\w*|copyreg)(\.|$)")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def translating(task: str) -> Iterator[None]:
    """Raise whatever torch, onnxscript or an operator's translation raises as an ExportError."""
    try:
        with quiet(), fx.traceback.preserve_node_meta():
            yield
    except OSError:
        raise
    except Exception as error:
        chain, cause = list[str](), cast(BaseException | None, error)
        while cause:
            chain.append(re.sub(r"\x1b\[\d+m", "", f"{type(cause).__name__}: {cause}"))
            cause = cause.__cause__
        told = "; ".join(chain[1:] or chain)  # the first of several only says where to report
        raise ExportError(f"torch cannot {task}: {told}") from error


@contextlib.contextmanager
def verifying(name: Path, path: str | os.PathLike[str]) -> Iterator[Callable[..., Report]]:
    """Give `judge`; raise what a file in the making at `name` fails at, by the path that it is to have.

    Raises:
        ExportError: the file cannot be used, or computes something else; then it is kept beside `path`.
    """

    def check(*arguments: Any) -> Report:
        comparison = judge(*arguments)
        if not comparison.ok:
            aside = Path(path).with_stem(f"{Path(path).stem}.mismatch")
            with atomic(aside) as kept:
                for part in list(name.parent.iterdir()):
                    part.rename(kept if part.name == name.name else kept.with_name(part.name))
            raise ExportError(
                f"the exported file computes something else than its source; kept as '{aside}'.\n{comparison.table()}"
            )
        return comparison

    try:
        yield check
    except (onnx.checker.ValidationError, CompareError) as error:
        told = str(error).replace(os.fspath(name), os.fspath(path))
        raise ExportError(f"the exported file cannot be used: {told}") from error


def size_of(name: Path) -> int:
    """Bytes of a file in its private folder, external data included."""
    return sum(part.stat().st_size for part in name.parent.iterdir())


def metadata(final: TracedModule, precision: str = "float32") -> dict[str, str]:
    """The entries by key, `fxprune.version` and so on; the same for equal modules."""

    found = {"version": __version__, "precision": precision, "digest": digest(final)}
    if final.plan is not None:
        found["plan"] = final.plan.explain()
    return {f"fxprune.{key}": value for key, value in found.items()}


def digest(final: TracedModule) -> str:
    """SHA-256 over the eval graph and every parameter and buffer, names, types and shapes included."""
    found = hashlib.sha256(text(final.graphs["eval"]).encode())
    for name, value in [*final.named_parameters(), *final.named_buffers()]:
        found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
