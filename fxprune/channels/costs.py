"""What an operator costs in multiply-accumulates for one sample, and which channels that is proportional to."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from fxprune.channels.ids import Vector
from fxprune.channels.macs import measured_macs, scale
from fxprune.channels.registry import REGISTRY, Cost
from fxprune.channels.walk import Result
from fxprune.graph.batch import Batch


def moved(node: fx.Node, batch: Batch) -> tuple[float, float, float] | None:
    """Elements of the output, the input and the weight that a convolution or linear layer moves, None for others."""
    call = REGISTRY.call(node) if node.op == "call_function" else None
    if call is None or call.traffic is None:
        return None
    share = batch.share(node)
    return call.traffic.output * share, call.traffic.data * share, float(call.traffic.weight)


def node_costs(node: fx.Node, env: Mapping[fx.Node, Result], batch: Batch) -> list[tuple[float, list[Vector] | None]]:
    """Multiply-accumulates of one sample by torch's formulas, in parts, each with the ids it is proportional to.

    None stands for what is proportional to nothing that can go.
    """
    share = batch.share(node)
    return [(cost.macs * share, _ids(cost)) for cost in _costs(node, env)]


def layer_macs(graph: fx.Graph) -> float:
    """Multiply-accumulates of the layers of a graph for one sample."""
    batch = Batch.of(graph)
    layers = [call for call in REGISTRY.calls(graph) if call.traffic is not None]
    return sum(cost.macs * batch.share(layer.node) for layer in layers for cost in layer.costs({}))


def macs_of_one_sample(graph: fx.Graph, counted: Mapping[fx.Node, int], batch: Batch) -> int:
    """What torch's counter saw of a graph that ran on its sample inputs, for one of the samples.

    Args:
        graph: the graph.
        counted: by node, what was seen. Recurrent layers that torch computes in one piece are not: these are measured.
        batch: that of the graph.
    """
    total = 0.0
    for node in graph.nodes:
        if node in counted:
            total += counted[node] * scale(node, batch)
        elif node.op == "call_function" and (call := REGISTRY.call(node)) is not None and call.costs({}):
            total += measured_macs(node) * batch.share(node)
    return round(total)


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
