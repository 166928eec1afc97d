"""The values of parameters as graphs compute with them, whatever reparametrizes these."""

from __future__ import annotations

import torch
from torch import fx

from fxprune.errors import FinalizeError, PruningError
from fxprune.graph.expressions import evaluate
from fxprune.graph.masks import ParameterView
from fxprune.graph.metadata import parameter_of, tagged
from fxprune.graph.names import locate
from fxprune.graph.traced import TracedModule


def under_mask(found: ParameterView, node: fx.Node) -> fx.Node:
    """Of a node that computes a parameter, what it multiplies with the mask; the node itself where there is none."""
    if found.mask is None:
        return node
    operand = node.args[1]
    assert isinstance(operand, fx.Node), node
    return operand


def unmasked(traced: TracedModule, found: ParameterView) -> torch.Tensor:
    """What the mask of a parameter acts on, or would act on: what is stored or what a norm computes; detached.

    Raises:
        PruningError: the graphs have no single value of it.
    """
    if found.original is not None:
        return found.original.detach()
    nodes = next((nodes for graph in traced.graphs.values() if (nodes := computing_nodes(traced, graph, found))), ())
    if not nodes:
        raise PruningError(f"{found.name!r} is computed in a way that no graph shows. Trace the eager model itself.")
    try:
        return evaluate(traced, under_mask(found, nodes[0])).detach()
    except FinalizeError as error:
        cure = "" if "eval" in traced.modes else ' Trace the model with modes=("train", "eval").'
        raise PruningError(f"{found.name!r} has no value of its own. {error}{cure}") from error


def masked_value(traced: TracedModule, found: ParameterView) -> torch.Tensor:
    """The values of a parameter that a graph computes with; detached."""
    values = unmasked(traced, found)
    return values if found.mask is None else found.mask.to(values.dtype) * values


def computing_nodes(traced: TracedModule, graph: fx.Graph, found: ParameterView) -> list[fx.Node]:
    """The nodes of a graph that compute a reparametrized parameter, under whichever of its names."""
    place = found.owner, found.attribute
    return [node for node in tagged(graph) if locate(traced, str(parameter_of(node))) == place]
