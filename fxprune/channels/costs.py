"""What an operator costs in multiply-accumulates, and which channels that is proportional to."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from fxprune.channels.ids import Vector
from fxprune.channels.macs import measured_macs
from fxprune.channels.registry import REGISTRY, Cost
from fxprune.channels.walk import Result


def moved(node: fx.Node) -> tuple[int, int, int] | None:
    """Elements of the output, the input and the weight that a convolution or linear layer moves, None for others."""
    call = REGISTRY.call(node) if node.op == "call_function" else None
    if call is None or call.traffic is None:
        return None
    return call.traffic.output, call.traffic.data, call.traffic.weight


def node_costs(node: fx.Node, env: Mapping[fx.Node, Result]) -> list[tuple[float, list[Vector] | None]]:
    """Multiply-accumulates by torch's formulas, in parts, each with the ids it is proportional to (None: constant)."""
    return [(cost.macs, _ids(cost)) for cost in _costs(node, env)]


def _costs(node: fx.Node, env: Mapping[fx.Node, Result]) -> list[Cost]:
    call = REGISTRY.call(node)
    if call is not None:
        return list(call.costs(env))
    macs = measured_macs(node)
    return [Cost(macs, None)] if macs else []


def _ids(cost: Cost) -> list[Vector] | None:
    if cost.axes is None:
        return None
    return [factor.ids for axis in cost.axes for factor in axis if factor.ids is not None]
