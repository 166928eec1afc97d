"""What an operator costs for one sample in multiply-accumulates, and in elements that it moves."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from fxprune.channels.macs import measured_macs, scale
from fxprune.channels.registry import REGISTRY, Cost, Traffic
from fxprune.channels.walk import Result
from fxprune.graph.batch import Batch


def node_traffic(node: fx.Node, batch: Batch) -> Traffic | None:
    """The elements that a convolution or linear layer moves for one sample, None for others."""
    call = REGISTRY.call(node) if node.op == "call_function" else None
    traffic = None if call is None else call.traffic
    return None if traffic is None else traffic.scaled(batch.share(node))


def node_costs(node: fx.Node, env: Mapping[fx.Node, Result], batch: Batch) -> list[Cost]:
    """Multiply-accumulates of one sample by torch's formulas, in parts."""
    share = batch.share(node)
    return [cost.scaled(share) for cost in _costs(node, env)]


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
            Nor are equations over one channel, which torch multiplies without a sum: these cost what their formula
            says, as for any number of channels.
        batch: that of the graph.
    """
    total = 0.0
    for node in graph.nodes:
        if node in counted and batch.is_by_values(node):  # as budgets count it, which see no values
            total += _said(node, batch)
        elif node in counted:
            total += counted[node] * scale(node, batch)
        elif node.op == "call_function" and (call := REGISTRY.call(node)) is not None and call.costs({}):
            total += measured_macs(node) * batch.share(node) or _said(node, batch)
    return round(total)


def _said(node: fx.Node, batch: Batch) -> float:
    """What formulas say of one sample, at the sizes that the graph says."""
    return sum(cost.macs for cost in node_costs(node, {}, batch))


def _costs(node: fx.Node, env: Mapping[fx.Node, Result]) -> list[Cost]:
    call = REGISTRY.call(node)
    if call is not None:
        return list(call.costs(env))
    macs = measured_macs(node)
    return [Cost(macs, None)] if macs else []
