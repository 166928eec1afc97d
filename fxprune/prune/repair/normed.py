"""Weights that a weight norm computes, g v / |v|: any fit can be, with v the fit itself and g its lengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxprune.channels.arguments import bound
from fxprune.graph.computed import NORM_SUFFIXES
from fxprune.graph.expressions import depending_on_inputs
from fxprune.graph.masks import view
from fxprune.graph.names import tensor_at
from fxprune.graph.traced import TracedModule
from fxprune.prune.repair.changes import Changes
from fxprune.prune.repair.finding import Weights

aten = torch.ops.aten
_LENGTH, _DIRECTION = NORM_SUFFIXES["weight_norm"]
_HOLDER = ".parametrizations."


@dataclass(frozen=True, eq=False)
class WeightNorm:
    """One weight norm.

    Attributes:
        direction, length: v and g. dim: of the weight, the axis that g has; -1 where it has none.
    """

    direction: nn.Parameter
    length: nn.Parameter
    dim: int

    def write(self, weight: Tensor, changes: Changes) -> None:
        """Give v and g values with which the norm computes a weight; where that is zero, v stays and g is zero."""
        lengths = torch.norm_except_dim(weight, 2, self.dim)
        changes.set(self.direction, torch.where(lengths == 0, self.direction.detach(), weight))
        changes.set(self.length, lengths.reshape(self.length.shape))


def weight_norms(traced: TracedModule) -> dict[str, WeightNorm]:
    """Of a module's eval graph, the weights that are what a weight norm of two parameters computes, masked or not."""
    graph = traced.graphs["eval"]
    nodes = graph.find_nodes(op="call_function", target=aten._weight_norm.default)
    if not nodes:
        return {}
    weights, moving = Weights(traced, graph), depending_on_inputs(graph)
    found: dict[str, list[fx.Node]] = {}
    for node in nodes:
        given = bound(node)
        if all(each.op == "get_attr" for each in (given["v"], given["g"])):
            found.setdefault(_computed(str(given["v"].target), str(given["g"].target)), []).append(node)
    return {
        name: norm
        for name, calls in found.items()
        if name and (norm := _norm(traced, calls, weights)) and moving.issuperset(_readers(weights, calls))
    }


def _norm(traced: TracedModule, calls: list[fx.Node], weights: Weights) -> WeightNorm | None:
    """The norm of these calls, None where its parameters are read by others, too."""
    given = bound(calls[0])
    pair = [tensor_at(traced, str(given[name].target)) for name in ("v", "g")]
    if any(bound(call)["dim"] != given["dim"] for call in calls):
        return None
    if any(weights.readers(str(given[name].target)) != {*calls} for name in ("v", "g")):
        return None
    direction, length = pair
    assert isinstance(direction, nn.Parameter)
    assert isinstance(length, nn.Parameter)
    return WeightNorm(direction, length, given["dim"])


def _computed(direction: str, length: str) -> str:
    """The name of the weight that a norm of two parameters computes, empty where they go by other names."""
    if direction.endswith(_DIRECTION) and length == direction.removesuffix(_DIRECTION) + _LENGTH:
        return direction.removesuffix(_DIRECTION)
    front, _, inner = f".{direction}".rpartition(_HOLDER)
    attribute, _, which = inner.rpartition(".")
    if which == "original1" and f".{length}" == f"{front}{_HOLDER}{attribute}.original0":
        return f"{front}.{attribute}"[1:]
    return ""


def _readers(weights: Weights, calls: list[fx.Node]) -> set[fx.Node]:
    return {reader for call in calls for reader in weights.consumers(call)}


def carry(plain: TracedModule, traced: TracedModule, norms: Mapping[str, WeightNorm], changes: Changes) -> None:
    """Write into a module what changed in its plain version, whose changes are in `changes`."""
    for name, norm in norms.items():
        original = view(plain, name).original
        assert original is not None
        if not torch.equal(changes.first(original), original):
            norm.write(original.detach(), changes)
    there = {**dict(traced.named_parameters()), **dict(traced.named_buffers())}
    for name, values in (*plain.named_parameters(), *plain.named_buffers()):
        own = there.get(name)
        if own is not None and own is not values and not torch.equal(own, values):
            changes.set(own, values.detach())
