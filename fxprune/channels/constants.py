"""Whole values that never change: a branch that is one leaves the graphs, and a buffer takes its place."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, fx

from fxprune.channels.coupling import Coupling, Val, Walk, carries, length, same
from fxprune.channels.rewrite import Kept, resized
from fxprune.channels.rules import is_pointwise
from fxprune.graph.mutation import is_mutating, written
from fxprune.graph.names import locate
from fxprune.graph.text import module_path
from fxprune.graph.traced import TracedModule


class Constant(NamedTuple):
    """`user` reads `node`, which always has the same value; `zero` where it adds nothing at all."""

    node: str
    user: str
    zero: bool


def find(coupling: Coupling) -> tuple[list[Constant], set[fx.Node]]:
    """The reads that a buffer can replace so that a branch dies, and the nodes of all graphs that stay.

    A read is replaced where (1) the value depends on the input's shape at most and is finite; (2) the reader is
    pointwise and does not write into it; (3) another operand has the result's full shape; (4) every graph has the same
    two nodes; (5) nothing else needs the value.
    """
    walk = coupling.walks["eval"]
    moving: set[fx.Node] = set()
    for node in walk.graph.nodes:
        if node.op == "placeholder" or any(n in moving for n in node.all_input_nodes):
            moving.add(node)
    edges = []
    for node in walk.graph.nodes:
        if node.op == "call_function" and node in moving and _fixed(walk.env.get(node)):
            edges += [Constant(node.name, u.name, False) for u in node.users if _replaceable(walk, node, u)]
    edges = [e for e in edges if all(_both(w, e) for w in coupling.walks.values())]
    while True:
        reached = {n for w in coupling.walks.values() for n in _reached(w, edges)}
        names = {n.name for n in reached}
        useful = [e for e in edges if e.node not in names]
        if len(useful) == len(edges):
            return edges, reached
        edges = useful


def _fixed(val: object) -> bool:
    """Whether a value is known everywhere, in a form that broadcasts."""
    if not isinstance(val, Val) or val.value is None or val.border is not None or not val.mask().all():
        return False
    return all(len(a) == 1 or not carries(a) for a in val.axes) and bool(val.value.isfinite().all())


def _replaceable(walk: Walk, node: fx.Node, user: fx.Node) -> bool:
    if not is_pointwise(user.target) or node in written(user) or _fixed(walk.env.get(user)):
        return False
    shape = user.meta["val"].shape
    others = [n.meta["val"].shape for n in user.all_input_nodes if n is not node and isinstance(walk.env.get(n), Val)]
    return any(len(o) == len(shape) and all(map(same, o, shape)) for o in others)


def _both(walk: Walk, edge: Constant) -> bool:
    nodes = {n.name: n for n in walk.env}
    return edge.node in nodes and edge.user in nodes and nodes[edge.node] in nodes[edge.user].all_input_nodes


def _reached(walk: Walk, edges: list[Constant]) -> set[fx.Node]:
    cut = {(e.node, e.user) for e in edges}
    seen: set[fx.Node] = set()
    for node in reversed(walk.graph.nodes):
        if node.op in ("output", "placeholder") or not _private(walk, node):
            seen.add(node)
        if node in seen:
            seen.update(n for n in node.all_input_nodes if (n.name, node.name) not in cut)
    return seen


def place(traced: TracedModule, coupling: Coupling, kept: Kept, constants: list[Constant]) -> list[Constant]:
    """Replace the reads; returns them with `zero` set. Without facts the values are zeros, to be loaded later."""
    done = []
    for node_name, user_name, zero in constants:
        walks = list(coupling.walks.values())
        pairs = [({n.name: n for n in w.env}, w) for w in walks]
        main = pairs[0][0][node_name]
        axes, value = walks[0].env[main].axes, walks[0].env[main].value
        shape = [length(a) for a in axes]
        value = torch.zeros(shape) if value is None else value.expand(shape)
        gone = [torch.from_numpy(kept.alive(a[0][1])) for a in axes if carries(a)]
        left = value
        for d, mask in zip([d for d, a in enumerate(axes) if carries(a)], gone, strict=True):
            left = left.index_select(d, mask.nonzero().squeeze(1))
        zero = zero or (
            value is not None and walks[0].facts and not left.any() and all(_sum(p[user_name]) for p, _ in pairs)
        )
        name = "" if zero else _register(traced, coupling, main, axes, value.to(main.meta["val"].dtype))
        for nodes, walk in pairs:
            node, user = nodes[node_name], nodes[user_name]
            if zero:
                user.replace_all_uses_with(next(n for n in user.all_input_nodes if n is not node))
                _erase(walk, user)
                continue
            with user.graph.inserting_before(user):
                read = user.graph.get_attr(name)
            read.meta["val"], walk.env[read] = resized(node.meta["val"], shape), Val(axes)
            user.replace_input_with(node, read)
            _erase(walk, node)
        done.append(Constant(node_name, user_name, zero))
    return done


def _private(walk: Walk, node: fx.Node) -> bool:
    """Whether what a node writes, if anything, is a value of its own that nothing else sees."""
    return all(t.op == "call_function" and not walk.is_view(t) and len(t.users) == 1 for t in written(node))


def _erase(walk: Walk, node: fx.Node) -> None:
    """Erase a node that nothing uses, and what it alone used; random operators as well."""
    if node._erased or node.users or node.op == "placeholder" or not _private(walk, node):
        return
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for n in inputs:
        _erase(walk, n)


def _sum(user: fx.Node) -> bool:
    """Whether a node only adds two values of one shape and type, and nothing writes into its result."""
    if user.target is not torch.ops.aten.add.Tensor or user.kwargs or len(user.all_input_nodes) != 2:
        return False
    a, b = (n.meta["val"] for n in user.all_input_nodes)
    return a.dtype == b.dtype and all(map(same, a.shape, b.shape)) and not any(map(is_mutating, user.users))


def _register(traced: TracedModule, coupling: Coupling, node: fx.Node, axes: tuple[object, ...], value: Tensor) -> str:
    path = module_path(node)
    try:
        owner = traced.get_submodule(path)
    except AttributeError:
        path, owner = "", traced
    n = 0
    while hasattr(owner, f"constant_{n}"):
        n += 1
    name = f"{path}.constant_{n}" if path else f"constant_{n}"
    owner.register_buffer(f"constant_{n}", value.clone())
    coupling.tensors[name] = getattr(*locate(traced, name))
    coupling.parameters[name] = [a[0][1] if carries(a) else None for a in axes]  # type: ignore[index, arg-type]
    return name
