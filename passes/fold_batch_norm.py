"""Fold batch normalization into the convolution or linear layer before it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from fxprune.channels.arguments import set_argument
from fxprune.channels.registry import REGISTRY
from fxprune.channels.rules.contractions import Linear
from fxprune.channels.rules.convolutions import Convolution
from fxprune.channels.rules.normalization import BatchNorm
from fxprune.graph.editing import erase_dead
from fxprune.graph.error_sites import working_on
from fxprune.graph.names import locate, tensor_at
from fxprune.graph.parameter_reads import ParameterReads
from fxprune.graph.requirements import require_eval
from fxprune.graph.traced import TracedModule

from .base import Pass

Layer = Convolution | Linear


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Scale the rows of a layer by what the batch norm behind it multiplies them with, in eval mode.

    The train graph is dropped, since it needs the two apart. Cases where both stay: (1) the layer's output has another
    user; (2) its weight or bias is read elsewhere, or is no parameter; (3) the norm has no running statistics; (4) the
    axes differ, as after a linear layer over sequences. Values are computed in float64 and rounded once.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference" (2018), section 3.2, https://arxiv.org/abs/1712.05877.

    Example:
        >>> FoldBatchNorm()(traced).modified
        True
    """

    name: ClassVar[str] = "fold-batch-norm"

    def requires(self, traced: TracedModule) -> None:
        require_eval(traced, self.name)

    def run(self, traced: TracedModule) -> bool:
        graph = traced.graphs["eval"]
        pairs = _foldable_pairs(traced, graph)
        if not pairs:
            return False
        traced.keep_modes("eval")
        traced.eval()
        for norm, layer in pairs:
            with working_on(norm.node):
                _fold(traced, norm, layer)
        erase_dead(graph)
        _drop_unread(traced, graph, dict.fromkeys(name for norm, _ in pairs for name in _state(norm)))
        return True


def _foldable_pairs(traced: TracedModule, graph: fx.Graph) -> list[tuple[BatchNorm, Layer]]:
    """The norms that can be folded, each with the layer before it."""
    reads = ParameterReads(traced, graph)
    holders = Counter(id(p) for module in traced.modules() for p in module._parameters.values())

    def own(read: Any) -> bool:
        """Whether a parameter is used once, and held under one name."""
        if not isinstance(read, fx.Node) or read.op != "get_attr":
            return False
        name = str(read.target)
        return sum(len(n.users) for n in reads.nodes(name)) == 1 and holders[id(tensor_at(traced, name))] == 1

    pairs = []
    for norm in REGISTRY.calls(graph):
        with working_on(norm.node):
            if not isinstance(norm, BatchNorm) or not _has_statistics(norm):  # (3)
                continue
            layer = REGISTRY.call(norm.data)
            if not isinstance(layer, Layer) or len(layer.node.users) > 1:  # (1)
                continue
            if isinstance(layer, Linear) and layer.node.meta["val"].dim() != 2:  # (4)
                continue
            if own(layer.weight) and (layer.shift is None or own(layer.shift)):  # (2)
                pairs.append((norm, layer))
    return pairs


def _state(norm: BatchNorm) -> list[str]:
    """The names of the parameters and statistics of a norm."""
    values = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return [str(value.target) for value in values if value is not None]


def _has_statistics(norm: BatchNorm) -> bool:
    """Whether all that a norm computes with stands in parameters and buffers."""
    if norm.training or norm.running_mean is None or norm.running_var is None:
        return False
    operands = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return all(operand is None or operand.op == "get_attr" for operand in operands)


def _fold(traced: TracedModule, norm: BatchNorm, layer: Layer) -> None:
    def double(read: Any) -> torch.Tensor:
        return tensor_at(traced, str(read.target)).detach().double()

    scale = torch.rsqrt(double(norm.running_var) + norm.eps)
    scale = scale if norm.weight is None else scale * double(norm.weight)
    shift = torch.zeros_like(scale) if layer.shift is None else double(layer.shift) * scale
    shift = shift - double(norm.running_mean) * scale
    if norm.bias is not None:
        shift = shift + double(norm.bias)
    target = str(layer.weight.target)
    weight = tensor_at(traced, target)
    _replace(traced, target, layer.scaled(double(layer.weight), scale), like=weight)
    if layer.shift is not None:
        _replace(traced, str(layer.shift.target), shift, like=weight)
    else:
        bias = _free_name(traced, target)
        _replace(traced, bias, shift, like=weight)
        with norm.node.graph.inserting_before(layer.node):
            read = norm.node.graph.get_attr(bias)
        assert norm.running_mean is not None
        read.meta["val"] = norm.running_mean.meta.get("val")
        set_argument(layer.node, "bias", read)
    norm.node.replace_all_uses_with(layer.node)


def _replace(traced: TracedModule, name: str, value: torch.Tensor, *, like: torch.Tensor) -> None:
    owner, attribute = locate(traced, name)
    owner._parameters[attribute] = nn.Parameter(value.to(like.dtype), like.requires_grad)


def _free_name(traced: TracedModule, weight: str) -> str:
    """The name of a bias beside a weight that has none."""
    owner, attribute = locate(traced, weight)
    bias = "bias" if getattr(owner, "bias", None) is None else f"{attribute}_bias"
    return weight.removesuffix(attribute) + bias


def _drop_unread(traced: TracedModule, graph: fx.Graph, names: dict[str, None]) -> None:
    reads = ParameterReads(traced, graph)
    for name in names:
        if not any(read.users for read in reads.nodes(name)):
            owner, attribute = locate(traced, name)
            for state in (owner._parameters, owner._buffers):
                state.pop(attribute, None)
            owner._buffers.pop("num_batches_tracked", None)
