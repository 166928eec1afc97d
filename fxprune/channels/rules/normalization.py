"""Normalizations: by stored statistics, which act on each channel, and by statistics over channels, which mix them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from fxprune.channels.axes import reduced_shape
from fxprune.channels.registry import OperatorCall, register
from fxprune.channels.values import Value, settled
from fxprune.channels.walk import Result, Walk
from fxprune.torch_internals import NormBase

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class _ChannelNorm(OperatorCall):
    """A gain and a shift for each channel of what is normalized."""

    data: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    running_mean: fx.Node | None
    running_var: fx.Node | None
    eps: float

    @property
    def gain(self) -> fx.Node | None:
        return self.weight

    @property
    def shift(self) -> fx.Node | None:
        return self.bias

    @property
    def over_input(self) -> bool:
        """Whether the statistics are those of the input."""
        return False

    def normalized(self, value: Tensor, mean: Tensor | None, variance: Tensor | None) -> Tensor | None:
        """Constant channels by stored statistics, which are laid out as the channels; None where there are none."""
        if self.over_input or mean is None or variance is None:
            return None
        return (value - mean) / (variance + self.eps).sqrt()

    def relate(self, walk: Walk) -> Result:
        value = walk.value(self.data)
        parts = [
            None if node is None else walk.value(node)
            for node in (self.weight, self.bias, self.running_mean, self.running_var)
        ]
        axis = walk.join(self.node, [value.axes[1], *(part.axes[0] for part in parts if part is not None)])
        value = self.separated(walk, value.relayout(1, axis))
        result = self._constants(walk, value, parts) if walk.facts and axis.carries else Value(value.axes)
        several = self.node.meta["val"]
        return [result, *(Value((axis,)) for _ in several[1:])] if isinstance(several, list | tuple) else result

    def separated(self, walk: Walk, value: Value) -> Value:
        """The value with the axes opaque that statistics are taken over."""
        return value

    def _constants(self, walk: Walk, value: Value, parts: list[Value | None]) -> Value:
        levelled = walk.training and self.over_input and all(n == 1 for n in _others(reduced_shape(value.axes)))
        if not all(part is None or part.stored for part in (parts[:2] if levelled else parts)):
            return Value(value.axes)
        column = [1, -1] + [1] * (value.rank - 2)
        gain, shift, mean, variance = (
            None if part is None or part.facts is None else part.facts.value.double().view(column) for part in parts
        )
        known, constant = torch.zeros([1] * value.rank, dtype=torch.bool), torch.zeros([1] * value.rank)
        if value.facts is not None:
            known, constant = value.facts.inner, value.facts.value
        zeros = torch.zeros_like(constant).double()
        normalized = zeros if levelled else self.normalized(constant.double(), mean, variance)
        if normalized is None:
            return Value(value.axes)
        if gain is not None:
            # a gain of zero leaves the shift, whatever comes in
            known = known | (gain == 0)
            normalized = torch.where(gain == 0, 0, normalized * gain)
        if shift is not None:
            normalized = normalized + shift
        return settled(value.axes, known, torch.where(known, normalized, 0))


def _others(shape: Sequence[int]) -> Sequence[int]:
    """All sizes but that of the channels."""
    return [*shape[:1], *shape[2:]]


@register(aten.batch_norm, aten.native_batch_norm)
@dataclass(frozen=True, eq=False)
class BatchNorm(_ChannelNorm):
    """By running statistics, in train mode by those of the batch."""

    training: bool
    # instance norms too
    modules: ClassVar = (NormBase,)

    @property
    def over_input(self) -> bool:
        return self.training

    @classmethod
    def module_sizes(cls, module: nn.Module) -> dict[str, Any]:
        found = module.weight if module.weight is not None else module.running_mean
        return {} if found is None else {"num_features": len(found)}  # type: ignore[arg-type]


@register(aten._native_batch_norm_legit_no_training, aten._batch_norm_no_update)
@dataclass(frozen=True, eq=False)
class InferenceBatchNorm(_ChannelNorm):
    """By running statistics."""


@register(aten.instance_norm)
@dataclass(frozen=True, eq=False)
class InstanceNorm(_ChannelNorm):
    """By statistics of each channel of each sample, or by running ones."""

    use_input_stats: bool

    @property
    def over_input(self) -> bool:
        return self.use_input_stats

    def separated(self, walk: Walk, value: Value) -> Value:
        return walk.blur(self.node, value, range(2, value.rank), "statistics over it")

    def normalized(self, value: Tensor, mean: Tensor | None, variance: Tensor | None) -> Tensor | None:
        # a channel that is constant over space is its own mean
        return torch.zeros_like(value) if self.over_input else super().normalized(value, mean, variance)


@dataclass(frozen=True, eq=False)
class _MixingNorm(OperatorCall):
    """By statistics over channels, which removal would change."""

    data: fx.Node
    weight: fx.Node | None

    @property
    def gain(self) -> fx.Node | None:
        return self.weight

    def first_axis(self, rank: int) -> int:
        """The first of the axes that statistics are taken over."""
        raise NotImplementedError

    def relate(self, walk: Walk) -> Result:
        value = walk.value(self.data)
        why = "normalized together, removal would change the statistics"
        value = walk.blur(self.node, value, range(self.first_axis(value.rank), value.rank), why)
        for operand in self.node.all_input_nodes[1:]:
            walk.pin_operand(self.node, operand, why)
        result = Value(value.axes)
        rest = walk.unknown(self.node)
        return [result, *rest[1:]] if isinstance(rest, list) else result


@register(aten.layer_norm, aten.native_layer_norm, aten.rms_norm, aten._fused_rms_norm)
@dataclass(frozen=True, eq=False)
class LayerNorm(_MixingNorm):
    """Over the last axes."""

    normalized_shape: list[Any]
    modules: ClassVar = (nn.LayerNorm, nn.RMSNorm)

    def first_axis(self, rank: int) -> int:
        return rank - len(self.normalized_shape)

    @classmethod
    def module_sizes(cls, module: nn.Module) -> dict[str, Any]:
        weight = module.weight
        return {"normalized_shape": tuple(weight.shape)} if isinstance(weight, Tensor) else {}


@register(aten.group_norm, aten.native_group_norm)
@dataclass(frozen=True, eq=False)
class GroupNorm(_MixingNorm):
    """Over space and the channels of a group."""

    modules: ClassVar = (nn.GroupNorm,)

    def first_axis(self, rank: int) -> int:
        return 1

    @classmethod
    def module_sizes(cls, module: nn.Module) -> dict[str, Any]:
        assert isinstance(module, nn.GroupNorm)
        if module.weight is None:
            return {}
        count = len(module.weight)
        return {"num_channels": count, "num_groups": module.num_groups * count // module.num_channels}
