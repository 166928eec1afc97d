"""Editing graphs: reads replaced by expressions, regions inlined, dead nodes erased."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from fxprune.graph.error_sites import working_on
from fxprune.graph.expressions import closure
from fxprune.graph.metadata import tag, tag_of
from fxprune.graph.mutation import draws, may_share_memory, memory_of, written, written_into
from fxprune.torch_internals import is_step_of_vmap

_aten = torch.ops.aten


def splice(graph: fx.Graph, source: fx.Graph, rename: Callable[[str], str]) -> list[fx.Node]:
    """Copy the nodes of `source` (a graph without inputs) to the insertion point; returns its flat outputs."""
    copied: dict[fx.Node, fx.Node] = {}
    for node in source.nodes:
        if node.op == "output":
            return [copied[out] for out in node.all_input_nodes]
        copied[node] = graph.node_copy(node, copied.__getitem__)
        if node.op == "get_attr":
            copied[node].target = rename(str(node.target))
        if origin := tag_of(node):
            tag(copied[node], origin | {"parameter": rename(origin["parameter"])})
    raise AssertionError("a graph without output")


def inline_no_grad_regions(graph: fx.Graph, submodules: nn.Module) -> None:
    """Replace `wrap_with_set_grad_enabled` regions by their nodes, gradients cut by `detach` at the entry.

    Inside a region without gradients every value is detached from what it was computed from, so detaching what
    enters it is the same; buffers enter as they are, which keeps their updates visible as nodes that write them. What a
    region writes into is behind it what was before, with its gradients: as eager, which writes and records nothing.
    """
    region = torch.ops.higher_order.wrap_with_set_grad_enabled
    for node in list(graph.find_nodes(op="call_function", target=region)):
        enabled, body, *operands = node.args
        inner = getattr(submodules, str(body.target))
        entering = dict(zip(inner.graph.find_nodes(op="placeholder"), operands, strict=True))
        with graph.inserting_before(node):
            values = entering if enabled else {n: _detached(graph, v, submodules) for n, v in entering.items()}
            for step in inner.graph.nodes:
                if step.op == "output":
                    outputs = fx.node.map_arg(step.args[0], lambda n, e=entering, v=values: _left(n, e, v))  # type: ignore[misc]
                elif step.op != "placeholder":
                    values[step] = graph.node_copy(step, values.__getitem__)
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(outputs[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
        if not body.users:
            graph.erase_node(body)


def _left(value: fx.Node, entering: dict[fx.Node, Any], values: dict[fx.Node, Any]) -> Any:
    """What a region leaves of a value: where that is one that entered and was written into, it as it entered.

    What has another shape or memory since (`y.t_()`, `y.set_(x)`, `out=y`) is what was made of the one that was cut.
    """
    base = written_into(value)
    was_cut = base in entering and entering[base] is not values[base]
    return entering[base] if was_cut and not _is_another_view(value, base) else values[value]


def _is_another_view(value: fx.Node, base: fx.Node) -> bool:
    if value.meta["val"].shape != base.meta["val"].shape:
        return True
    while value is not base:
        if torch.Tag.inplace_view in getattr(value.target, "tags", ()):
            return True
        value = written(value)[0]
    return False


def _detached(graph: fx.Graph, operand: Any, root: nn.Module) -> Any:
    if not isinstance(operand, fx.Node) or not isinstance(operand.meta.get("val"), torch.Tensor):
        return operand
    if operand.op == "get_attr" and not operand.meta["val"].requires_grad:
        return operand
    detached = graph.call_function(_aten.detach.default, (operand,))
    detached.meta = dict(operand.meta)
    return detached


def erase_dead(graph: fx.Graph, removed: Callable[[str], bool] = lambda target: False) -> bool:
    """Erase nodes without users and without effect; a write to a buffer whose target is `removed` is no effect.

    The value of a reparametrized parameter stays, read or not: it is what the parameter folds to. What reads a removed
    target goes, random or not.
    """
    changed = False
    for node in reversed(list(graph.nodes)):
        if node.users or node.op in ("placeholder", "output") or tag_of(node):
            continue
        with working_on(node):
            if _has_no_effect(node, removed):
                graph.erase_node(node)
                changed = True
    return changed


def _has_no_effect(node: fx.Node, removed: Callable[[str], bool]) -> bool:
    if written(node):
        return _writes_what_nothing_reads(node, removed)
    if is_step_of_vmap(node.target):
        return False
    if node.op == "call_function" and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        is_pure = not draws(node)
    else:
        is_pure = not node.is_impure()
    return is_pure or any(n.op == "get_attr" and removed(str(n.target)) for n in closure(node))


def _writes_what_nothing_reads(write: fx.Node, removed: Callable[[str], bool]) -> bool:
    """Whether the memory that a node writes to is that of removed buffers, or of fresh values that nothing else reads.

    What reads them behind the node and is dead itself has been erased before.
    """
    fresh = set()
    for root in (node for node, sources in memory_of(written(write)).items() if not sources):
        if root.op == "placeholder" or (root.op == "get_attr" and not removed(str(root.target))):
            return False
        if root.op != "get_attr":
            fresh.add(root)
    family, pending = {write, *fresh}, [*fresh]
    while pending:
        for user in pending.pop().users:
            if user not in family:
                if not written(user) and not may_share_memory(user):
                    return False
                family.add(user)
                pending.append(user)
    return True
