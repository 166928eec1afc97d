"""Fold batch normalization into the convolution or linear layer before it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import fx, nn

from fxprune.graph.editing import erase_dead
from fxprune.graph.error_sites import working_on
from fxprune.graph.names import locate, tensor_at
from fxprune.graph.parameter_reads import ParameterReads
from fxprune.graph.requirements import require_eval
from fxprune.graph.traced import TracedModule

from .base import Pass

_aten = torch.ops.aten
_FIRST = (  # operators whose output channels are the weight's first axis
    _aten.conv1d.default, _aten.conv1d.padding, _aten.conv2d.default, _aten.conv2d.padding, _aten.conv3d.default,
    _aten.conv3d.padding, _aten.linear.default,
)  # fmt: skip
_SECOND = (_aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input)  # in each group
_BIAS, _GROUPS = 2, 6  # argument positions


@dataclass(frozen=True)
class _Layer:
    """The call of a convolution or a linear layer; `groups` is None where the weight's first axis is the outputs'."""

    node: fx.Node
    weight: Any
    bias: Any
    groups: int | None

    @classmethod
    def of(cls, node: Any) -> _Layer | None:
        """The call that a node is, None for any other."""
        if not isinstance(node, fx.Node) or node.target not in (*_FIRST, *_SECOND):
            return None
        bias = node.args[_BIAS] if len(node.args) > _BIAS else node.kwargs.get("bias")
        groups: Any = node.args[_GROUPS] if len(node.args) > _GROUPS else 1
        return cls(node, node.args[1], bias, groups if node.target in _SECOND else None)

    def read_bias(self, bias: fx.Node) -> None:
        """Give the call a bias that it lacks."""
        self.node.args = (*self.node.args[:_BIAS], bias, *self.node.args[_BIAS + 1 :])

    def scaled(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The weight times a factor for each output channel."""
        if self.groups is None:
            return weight * scale.view(-1, *[1] * (weight.dim() - 1))
        split = weight.unflatten(0, (self.groups, -1))
        scaled: torch.Tensor = split * scale.view(self.groups, 1, -1, *[1] * (weight.dim() - 2))
        return scaled.flatten(0, 1)


@dataclass(frozen=True)
class _Norm:
    """The call of a batch norm."""

    node: fx.Node
    input: Any
    gain: Any
    shift: Any
    mean: Any
    variance: Any
    training: bool
    eps: float

    @classmethod
    def of(cls, node: fx.Node) -> _Norm:
        data, gain, shift, mean, variance, training, _, eps, *_ = cast(tuple[Any, ...], node.args)
        return cls(node, data, gain, shift, mean, variance, training, eps)

    @property
    def state(self) -> list[str]:
        """The names of its parameters and statistics."""
        values = (self.gain, self.shift, self.mean, self.variance)
        return [str(value.target) for value in values if isinstance(value, fx.Node)]


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
        _drop_unread(traced, graph, dict.fromkeys(name for norm, _ in pairs for name in norm.state))
        return True


def _foldable_pairs(traced: TracedModule, graph: fx.Graph) -> list[tuple[_Norm, _Layer]]:
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
    for node in graph.find_nodes(op="call_function", target=_aten.batch_norm.default):
        with working_on(node):
            norm = _Norm.of(node)
            layer = _Layer.of(norm.input)
            if layer is None or len(layer.node.users) > 1:  # (1)
                continue
            if not _has_statistics(norm):  # (3)
                continue
            if layer.node.target is _aten.linear.default and layer.node.meta["val"].dim() != 2:  # (4)
                continue
            if own(layer.weight) and (layer.bias is None or own(layer.bias)):  # (2)
                pairs.append((norm, layer))
    return pairs


def _has_statistics(norm: _Norm) -> bool:
    """Whether all that a norm computes with stands in parameters and buffers."""
    if norm.training or norm.mean is None or norm.variance is None:
        return False
    return all(a is None or a.op == "get_attr" for a in (norm.gain, norm.shift, norm.mean, norm.variance))


def _fold(traced: TracedModule, norm: _Norm, layer: _Layer) -> None:
    def double(read: Any) -> torch.Tensor:
        return tensor_at(traced, str(read.target)).detach().double()

    scale = torch.rsqrt(double(norm.variance) + norm.eps)
    scale = scale if norm.gain is None else scale * double(norm.gain)
    shift = torch.zeros_like(scale) if layer.bias is None else double(layer.bias) * scale
    shift = shift - double(norm.mean) * scale
    if norm.shift is not None:
        shift = shift + double(norm.shift)
    target = str(layer.weight.target)
    weight = tensor_at(traced, target)
    _replace(traced, target, layer.scaled(double(layer.weight), scale), like=weight)
    if layer.bias is not None:
        _replace(traced, str(layer.bias.target), shift, like=weight)
    else:
        bias = _free_name(traced, target)
        _replace(traced, bias, shift, like=weight)
        with norm.node.graph.inserting_before(layer.node):
            layer.read_bias(norm.node.graph.get_attr(bias))
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
