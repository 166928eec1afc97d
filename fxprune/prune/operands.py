"""Which parameters of a graph are biases, and which are gains of batch norms: a score of channels tells them apart."""

from __future__ import annotations

from torch import fx

from fxprune.channels.registry import REGISTRY
from fxprune.channels.rules.normalization import BatchNorm, InferenceBatchNorm


def bias_operands(graph: fx.Graph) -> set[str]:
    """The names of what is added to the outputs of layers and batch norms: parameters and, where it is one, a node."""
    return {str(call.shift.target) for call in REGISTRY.calls(graph) if call.shift is not None}


def gain_operands(graph: fx.Graph) -> set[str]:
    """The names of what batch norms multiply by."""
    norms = (call for call in REGISTRY.calls(graph) if isinstance(call, BatchNorm | InferenceBatchNorm))
    return {str(norm.gain.target) for norm in norms if norm.gain is not None}
