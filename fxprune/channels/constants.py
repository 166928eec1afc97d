"""Whole values that never change: a branch that is one leaves the graphs, and a buffer takes its place."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx

from fxprune.channels.axes import Axis, reduced_shape, same_size
from fxprune.channels.coupling import Coupling
from fxprune.channels.edits import Kept
from fxprune.channels.registry import is_pointwise
from fxprune.channels.shapes import resized
from fxprune.channels.values import Value
from fxprune.channels.walk import Result, Walk
from fxprune.graph.buffers import hold_buffer
from fxprune.graph.mutation import is_mutating, written
from fxprune.graph.names import tensor_at
from fxprune.graph.traced import TracedModule
from fxprune.torch_internals import is_erased


class Constant(NamedTuple):
    """`user` reads `node`, which always has the same value; `zero` where it adds nothing at all."""

    node: str
    user: str
    zero: bool


def find(coupling: Coupling, left_alone: Collection[Constant] = ()) -> tuple[list[Constant], set[fx.Node]]:
    """The reads that a buffer can replace so that a branch dies, and the nodes of all graphs that stay.

    A read is replaced where (1) the value depends on the input's shape at most and is finite; (2) the reader is
    pointwise and does not write into it; (3) another operand, which stays, has the result's full shape; (4) every
    graph has the same two nodes; (5) nothing else needs the value; and those are not that are left alone.
    """
    walk = coupling.walks["eval"]
    candidates: list[Constant] = []
    replaced: dict[fx.Node, set[fx.Node]] = {}
    for node in _moving(walk.graph):
        if node.op != "call_function" or not _is_fixed(walk.env.get(node)):  # (1)
            continue
        for user in node.users:
            if _is_replaceable(walk, node, user, replaced.setdefault(user, set())):  # (2), (3)
                replaced[user].add(node)
                candidates.append(Constant(node.name, user.name, False))
    nodes = {mode: {node.name: node for node in each.env} for mode, each in coupling.walks.items()}
    candidates = [edge for edge in candidates if edge not in left_alone]
    edges = [edge for edge in candidates if all(_has(names, edge) for names in nodes.values())]  # (4)
    while True:
        reached = {node for each in coupling.walks.values() for node in _reached(each, edges)}
        names = {node.name for node in reached}
        useful = [edge for edge in edges if edge.node not in names]  # (5)
        if len(useful) == len(edges):
            return edges, reached
        edges = useful


def _moving(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that depend on an input, in order."""
    moving: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op == "placeholder" or any(operand in moving for operand in node.all_input_nodes):
            moving[node] = None
    return list(moving)


def _is_fixed(value: Result) -> bool:
    """Whether a value is known everywhere, in a form that broadcasts."""
    if not isinstance(value, Value) or value.facts is None or value.facts.border is not None:
        return False
    if not value.facts.where.all() or not value.facts.value.isfinite().all():
        return False
    return all(len(axis) == 1 or not axis.carries for axis in value.axes)


def _is_replaceable(walk: Walk, node: fx.Node, user: fx.Node, replaced: Collection[fx.Node]) -> bool:
    if not is_pointwise(user.target) or node in written(user) or _is_fixed(walk.env.get(user)):
        return False
    shape = user.meta["val"].shape
    others = [
        other.meta["val"].shape
        for other in user.all_input_nodes
        if other is not node and other not in replaced and isinstance(walk.env.get(other), Value)
    ]
    return any(_same_shape(other, shape) for other in others)


def _same_shape(shape: Sequence[object], other: Sequence[object]) -> bool:
    return len(shape) == len(other) and all(map(same_size, shape, other))


def _has(nodes: dict[str, fx.Node], edge: Constant) -> bool:
    """Whether a graph, its nodes by name, has the same read."""
    return edge.node in nodes and edge.user in nodes and nodes[edge.node] in nodes[edge.user].all_input_nodes


def _reached(walk: Walk, edges: list[Constant]) -> set[fx.Node]:
    """The nodes that the outputs, or effects that others see, need once the edges are cut."""
    cut = {(edge.node, edge.user) for edge in edges}
    seen: set[fx.Node] = set()
    for node in reversed(walk.graph.nodes):
        if node.op in ("output", "placeholder") or not _is_private(walk, node):
            seen.add(node)
        if node in seen:
            seen.update(operand for operand in node.all_input_nodes if (operand.name, node.name) not in cut)
    return seen


def _is_private(walk: Walk, node: fx.Node) -> bool:
    """Whether what a node writes, if anything, is a value of its own that none but its readers see."""
    family = {node} if written(node) else set()
    family.update(other for target in written(node) for other in walk.sharing(target))
    return all(o.op == "call_function" and (o is node or family.issuperset(o.users)) for o in family)


def place(traced: TracedModule, coupling: Coupling, kept: Kept, constants: Sequence[Constant]) -> list[Constant]:
    """Replace the reads, and erase what writes a value that nothing reads.

    Returns the constants with `zero` set. Without facts the values are zeros, to be loaded later.
    """
    nodes = {mode: {node.name: node for node in walk.env} for mode, walk in coupling.walks.items()}
    placed = []
    for edge in constants:
        zero = _place(traced, coupling, kept, edge, nodes)
        placed.append(Constant(edge.node, edge.user, zero))
    for walk in coupling.walks.values():
        for node in reversed(list(walk.graph.nodes)):
            if not is_erased(node) and written(node):
                _erase(walk, node)
    return placed


def _place(
    traced: TracedModule, coupling: Coupling, kept: Kept, edge: Constant, nodes: dict[str, dict[str, fx.Node]]
) -> bool:
    """Replace one read in every graph; returns whether the value adds nothing."""
    main = coupling.walks["eval"]
    node = nodes["eval"][edge.node]
    value = main.value(node)
    shape = reduced_shape(value.axes)
    constant = torch.zeros(shape) if value.facts is None else value.facts.value.expand(shape)
    users = [names[edge.user] for names in nodes.values()]
    zero = edge.zero or (main.facts and not _what_stays(constant, value.axes, kept).any() and all(map(_adds, users)))
    name = (
        ""
        if zero
        else _register(traced, coupling, node, value.axes, constant.to(node.meta["val"].device, node.meta["val"].dtype))
    )
    for mode, walk in coupling.walks.items():
        read, user = nodes[mode][edge.node], nodes[mode][edge.user]
        if zero:
            user.replace_all_uses_with(next(other for other in user.all_input_nodes if other is not read))
            _erase(walk, user)
        else:
            with user.graph.inserting_before(user):
                buffer = user.graph.get_attr(name)
            buffer.meta["val"], walk.env[buffer] = resized(read.meta["val"], shape), Value(value.axes)
            user.replace_input_with(read, buffer)
            _erase(walk, read)
    return bool(zero)


def _what_stays(constant: Tensor, axes: Sequence[Axis], kept: Kept) -> Tensor:
    for dim, axis in enumerate(axes):
        if axis.ids is not None:
            constant = constant.index_select(dim, torch.from_numpy(kept.alive(axis.ids)).nonzero().squeeze(1))
    return constant


def _erase(walk: Walk, last: fx.Node) -> None:
    """Erase a node that nothing uses, and what it alone used; random operators as well."""
    pending = [last]
    while pending:
        node = pending.pop()
        if is_erased(node) or node.users or node.op == "placeholder" or not _is_private(walk, node):
            continue
        pending += reversed(node.all_input_nodes)
        node.graph.erase_node(node)


def _adds(user: fx.Node) -> bool:
    """Whether a node only adds two values of one shape and type, and nothing writes into its result."""
    if user.target is not torch.ops.aten.add.Tensor or user.kwargs or len(user.all_input_nodes) != 2:
        return False
    left, right = (operand.meta["val"] for operand in user.all_input_nodes)
    same = left.dtype == right.dtype and _same_shape(left.shape, right.shape)
    return same and not any(map(is_mutating, user.users))


def _register(traced: TracedModule, coupling: Coupling, node: fx.Node, axes: Sequence[Axis], value: Tensor) -> str:
    """Hold a constant as a buffer of the module that computed it; returns its name."""
    name = hold_buffer(node, "constant", value.clone())
    coupling.tensors[name] = tensor_at(traced, name)
    coupling.parameters[name] = [axis.ids for axis in axes]
    return name
