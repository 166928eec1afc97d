"""The values of a model's own reparametrizations, found in its captured graphs and tagged with their parameters."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx, nn

from fxprune.graph.metadata import module_calls, parameter_of, tag
from fxprune.graph.mutation import is_mutating
from fxprune.graph.names import join
from fxprune.graph.reparametrizations import Carried, carried, hook_state

_aten = torch.ops.aten


def tag_results(graph: fx.Graph, model: nn.Module) -> None:
    """Mark the nodes that compute a tensor the model reparametrizes."""
    items = sorted(carried(model), key=lambda item: item.kind != "parametrization")  # hooks read those too
    for item in items:
        if item.kind == "parametrization":
            paths = [join(i.path, f"parametrizations.{i.tensor}") for i in items if i.parameter == item.parameter]
            results = _parametrization_results(graph, tuple(paths))
        else:
            results = list(_hook_results(graph, item))
        for node in results:
            tag(node, {"pass": item.kind.replace("_", "-"), "parameter": item.parameter})


def _parametrization_results(graph: fx.Graph, paths: tuple[str, ...]) -> list[fx.Node]:
    below = tuple(path + "." for path in paths)

    def inside(node: fx.Node) -> bool:
        return any(path in paths or path.startswith(below) for path, _ in module_calls(node).values())

    body = [node for node in graph.nodes if inside(node) and not is_mutating(node)]
    # a parametrization that returns what it got leaves no node: the read of the original is the result
    originals = tuple(path + "original" for path in below)
    body = body or [node for node in graph.find_nodes(op="get_attr") if str(node.target).startswith(originals)]
    return [node for node in body if any(not inside(user) and not is_mutating(user) for user in node.users)]


def _hook_results(graph: fx.Graph, item: Carried) -> Iterator[fx.Node]:
    """The nodes that compute what a hook computes: products, `_weight_norm`, quotients of its stored state."""
    state = hook_state(item.kind, item.tensor)

    def reads(operand: object, stored: str) -> bool:
        return _stands_for(operand, item, stored)

    for node in list(graph.nodes):
        if item.kind == "prune" and node.target is _aten.mul.Tensor:
            mask, original = node.args
            if reads(mask, state[1]) and reads(original, state[0]):
                if mask.target is _aten.to.dtype and mask.args[1] == mask.args[0].meta["val"].dtype:
                    # no conversion here; without it the mask follows a later change of the parameter's dtype
                    node.args = (mask.args[0], original)
                yield node
        elif item.kind == "weight_norm" and node.target is _aten._weight_norm.default:
            if reads(node.args[0], state[1]) and reads(node.args[1], state[0]):
                yield node
        elif item.kind == "spectral_norm" and node.target is _aten.div.Tensor and reads(node.args[0], state[0]):
            yield node


def _stands_for(node: object, item: Carried, stored: str) -> bool:
    """Whether a node is the value of the item's state `stored`, as it is or in another shape or dtype."""
    while isinstance(node, fx.Node) and node.target in (_aten.reshape.default, _aten.to.dtype):
        node = node.args[0]
    if not isinstance(node, fx.Node):
        return False
    front = item.parameter.rpartition(".")[0]
    names = {join(item.path, stored), join(front, stored)}
    return not names.isdisjoint((node.target, parameter_of(node)))
