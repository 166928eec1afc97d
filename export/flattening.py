"""The graph that is written: the eval graph with its reparametrizations folded, in forms that torch's writers take."""

from __future__ import annotations

import contextlib
import keyword
import operator
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from fxprune.errors import ArgumentTypeError, ExportError, FinalizeError
from fxprune.graph.calls import Call
from fxprune.graph.codegen import CodeGen
from fxprune.graph.editing import erase_dead
from fxprune.graph.equality import is_finite
from fxprune.graph.expressions import evaluate
from fxprune.graph.metadata import parameter_of, untag
from fxprune.graph.requirements import require_eval
from fxprune.graph.traced import TracedModule
from fxprune.torch_internals import pytree_info

from .node_values import ORIGIN
from .values import identifier, named_leaves, path_text

aten = torch.ops.aten


def check_source(module: object, function: str) -> None:
    """Refuse what cannot be exported.

    Raises:
        ArgumentTypeError: no traced module.
        ExportError: it has no eval graph, or NaN or inf among its parameters.
    """
    if not isinstance(module, TracedModule):
        cure = "The module comes first, then the path." if isinstance(module, str | os.PathLike) else "Trace it first."
        raise ArgumentTypeError(
            f"{function} was given a {type(module).__name__}; it takes what fxprune.trace returns. {cure}"
        )
    require_eval(module, function, ExportError)
    # a buffer may hold -inf on purpose (an attention mask), never NaN
    bad = [name for name, parameter in module.named_parameters() if not is_finite(parameter)]
    bad += [name for name, buffer in module.named_buffers() if buffer.isnan().any()]
    if bad:
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise ExportError(f"NaN or inf in {', '.join(bad[:10])}{more}: refused, since it would spread. Train again.")


@dataclass(frozen=True)
class Flat:
    """What is written of a traced module.

    Attributes:
        module: the eval graph over folded parameters; every node says in its metadata which node it was.
        output_names: for the outputs, where these are a tuple of tensors.
        parameters: the names that parameters have in `final`, by their names here: a module may be called `class`,
            which the code that torch generates cannot spell.
    """

    module: fx.GraphModule
    output_names: list[str]
    parameters: dict[str, str]


def flatten(final: TracedModule, structured: bool = False) -> Flat:
    """The eval graph with reparametrizations folded, and a plain tuple of tensors as its output.

    With `structured`, the output is what it was, in plain containers.
    """
    source = final.graphs["eval"]
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    outputs = pytree.tree_leaves(graph.graph_copy(source, copies))
    for original, copied in copies.items():
        copied.meta["custom"] = {ORIGIN: original.name}
    info = pytree_info(source)
    assert info.out_spec is not None
    names: list[str] = []
    tree: Any
    if structured:
        tree = _plain(pytree.tree_unflatten(outputs, info.out_spec))
    else:
        stand_ins = [torch.zeros(1, 1, 1, 1)] * len(outputs)  # some classes, as caches, take tensors alone
        paths = [path for path, _ in named_leaves(pytree.tree_unflatten(stand_ins, info.out_spec))]
        named = _separate_tensors(graph, paths, outputs)
        tree, names = tuple(named), list(named.values())
    graph.output(tuple(pytree.tree_leaves(tree)))
    graph.set_codegen(CodeGen(info._replace(out_spec=pytree.tree_structure(tree))))
    if not structured:
        _copy_for_contiguity(graph)
    folded = _fold(final, graph)
    root, parameters = _spelled(final, graph, folded)
    module = fx.GraphModule(root, graph)
    module.training = False
    return Flat(module, names, parameters)


def take_as_given(module: fx.GraphModule, call: Call) -> None:
    """Have a flat module take arguments in the containers of this call, whose leaves are the captured ones."""
    info = pytree_info(module.graph)
    structure = pytree.tree_structure(tuple(call))
    if structure != info.in_spec:
        module.graph.set_codegen(CodeGen(info._replace(in_spec=structure)))
        module.recompile()


def _separate_tensors(graph: fx.Graph, paths: list[str], outputs: list[Any]) -> dict[fx.Node, str]:
    """A node of its own for each output, and its name.

    torch's exporter drops None, fails on numbers, and gives one ONNX value to an output that is returned twice, is
    an input or a parameter; renaming one of those would rename the other.
    """
    named: dict[fx.Node, str] = {}
    for path, output in zip(paths, outputs, strict=True):
        if isinstance(output, int | float):
            dtype = torch.tensor(output).dtype
            named[graph.call_function(aten.scalar_tensor.default, (output,), {"dtype": dtype})] = path
        elif isinstance(output, fx.Node) and (output in named or output.op != "call_function"):
            named[graph.call_function(aten.clone.default, (output,))] = path
        elif isinstance(output, fx.Node):
            named[output] = path
    return {node: identifier(path, "output") for node, path in named.items()}


def _plain(tree: Any) -> Any:
    """A pytree in dicts, lists and tuples, which every reader knows."""
    if isinstance(tree, fx.Node | None | int | float | str):
        return tree
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_plain(value) for value in tree]
    if isinstance(tree, tuple):
        return tuple(_plain(value) for value in tree)
    parts, _ = pytree.tree_flatten_with_path(tree, is_leaf=lambda part: part is not tree)
    return {path_text(path): _plain(part) for path, part in parts}


def _copy_for_contiguity(graph: fx.Graph) -> None:
    """torch's exporter drops `contiguous` after an attention of one layout, and then meets another layout."""
    for node in graph.find_nodes(op="call_function", target=aten.contiguous.default):
        node.target, node.kwargs = aten.clone.default, {"memory_format": torch.contiguous_format, **node.kwargs}


def _fold(final: TracedModule, graph: fx.Graph) -> dict[str, torch.Tensor]:
    """Replace what reparametrizations compute by reads of parameters; returns their values by name.

    What depends on an input stays an expression. A value that only another one is computed from is folded with it.
    """
    folded: dict[str, torch.Tensor] = {}
    needed: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        if node not in needed and not node.is_impure():
            continue
        name = parameter_of(node)
        if name is not None:
            with contextlib.suppress(FinalizeError):
                folded[name] = evaluate(final, node)
                with graph.inserting_before(node):
                    read = graph.get_attr(name)
                read.meta["val"] = node.meta["val"]
                node.replace_all_uses_with(read)
                continue
        needed.update(node.all_input_nodes)
    for node in graph.nodes:
        untag(node)  # `erase_dead` keeps what has it, read or not
    erase_dead(graph)
    return folded


def _spelled(
    final: TracedModule, graph: fx.Graph, folded: dict[str, torch.Tensor]
) -> tuple[dict[str, Any], dict[str, str]]:
    """What the reads of the graph find, and the names in `final`; both by names that Python can spell."""
    root: dict[str, Any] = {}
    names: dict[str, str] = {}
    for node in graph.find_nodes(op="get_attr"):
        target = str(node.target)
        node.target = ".".join(f"{part}_" if keyword.iskeyword(part) else part for part in target.split("."))
        root[node.target] = folded[target] if target in folded else operator.attrgetter(target)(final)
        names[node.target] = target
    return root, names
