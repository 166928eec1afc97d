"""Normalizations: by stored statistics, which act on each channel, and by statistics over channels, which mix them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from fxprune.channels.arguments import bound
from fxprune.channels.axes import reduced_shape
from fxprune.channels.edits import Edit
from fxprune.channels.ids import Vector
from fxprune.channels.means import has_space
from fxprune.channels.registry import OperatorCall, register
from fxprune.channels.statistics import FirstResultAlone, GroupStatistics, PadWithZeros, RootMeanSquare, counted
from fxprune.channels.values import Value, beside, settled
from fxprune.channels.walk import Result, Walk
from fxprune.graph.expressions import closure, is_repeatable
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

        def result_of(constants: Tensor) -> Tensor | None:
            zeros = torch.zeros_like(constants).double()
            normalized = zeros if levelled else self.normalized(constants.double(), mean, variance)
            if normalized is None:
                return None
            if gain is not None:
                # a gain of zero leaves the shift, whatever comes in
                normalized = torch.where(gain == 0, 0, normalized * gain)
            return normalized if shift is None else normalized + shift

        if (normalized := result_of(constant)) is None:
            return Value(value.axes)
        if gain is not None:
            known = known | (gain == 0)
        result = settled(value.axes, known, torch.where(known, normalized, 0))
        self._note_means(walk, value, result_of)
        maps, shape = walk.maps.get(self.data), reduced_shape(value.axes)
        if maps is None or self.over_input or not maps.fits(shape):
            return result
        own, by_position = maps.laid(value.rank)
        computed = result_of(by_position)
        return result if computed is None else walk.note_maps(self.node, result, maps, own & ~known, computed)

    def _note_means(self, walk: Walk, value: Value, result_of: Callable[[Tensor], Tensor | None]) -> None:
        """The means over space follow from those of the operand: gain and shift are the same at all positions."""
        means = walk.means.get(self.data)
        if means is None or self.over_input or not means.fits(value.axes):
            return
        computed = result_of(means.value)
        if computed is not None:
            walk.note_means(self.node, value, means.where, computed)


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

    def separated(self, walk: Walk, value: Value) -> Value:
        if not self.over_input:
            return value
        others = [dim for dim in range(value.rank) if dim != 1]
        if self.running_mean is None and all(map(is_repeatable, closure(self.data))):  # a weight, which has one value
            for dim in others:
                walk.pin_axis(self.node, value.axes[dim], "statistics over it")
            return value
        return walk.blur(self.node, value, others, "statistics over it")

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
        over = [dim for dim in range(2, value.rank) if value.axes[dim].carries]
        if len(over) == 1 and self.use_input_stats and self.running_mean is None:
            flat, ids = walk.merged(self.node, value, over[0])
            if ids is not None:
                counted(walk, self.node, flat, over[0], ids, key=self.node.name)
                walk.normalized.append(ids)
                walk.edits.append(PadWithZeros(self.node, ids, {"input": over[0]}, over[0]))
                return Value(value.axes)
        return walk.blur(self.node, value, range(2, value.rank), "statistics over it")

    def normalized(self, value: Tensor, mean: Tensor | None, variance: Tensor | None) -> Tensor | None:
        # a channel that is constant over space is its own mean
        return torch.zeros_like(value) if self.over_input else super().normalized(value, mean, variance)

    def _note_means(self, walk: Walk, value: Value, result_of: Callable[[Tensor], Tensor | None]) -> None:
        if not self.over_input:
            super()._note_means(walk, value, result_of)
        elif has_space(value.axes):  # whatever comes in, its mean goes
            computed = result_of(torch.zeros(reduced_shape(value.axes)))
            if computed is not None:
                walk.note_means(self.node, value, torch.ones((), dtype=torch.bool), computed)


@dataclass(frozen=True, eq=False)
class _MixingNorm(OperatorCall):
    """By statistics over channels, which count those that are zero and went."""

    data: fx.Node
    weight: fx.Node | None

    @property
    def keeps_zeros(self) -> bool:
        """Whether zero becomes zero, gain and shift aside."""
        return False

    @property
    def gain(self) -> fx.Node | None:
        return self.weight

    @property
    def parts(self) -> dict[str, fx.Node]:
        """Gain and shift by the names of their arguments, where they are there."""
        given = bound(self.node)
        return {name: given[name] for name in ("weight", "bias") if given.get(name) is not None}

    @property
    def key(self) -> str:
        """The same in every graph."""
        gain = self.weight
        return str(gain.target) if gain is not None and gain.op == "get_attr" else self.node.name

    @property
    def normalized(self) -> fx.Node:
        """The node whose value is normalized: the call, or the one that takes the first of its results."""
        return self.node if not _gives_several(self.node) else next(iter(self.node.users))

    def results(self, walk: Walk, value: Value) -> Result:
        """What the call gives: the normalized value, then statistics, if any, which hold no channels."""
        rest = walk.unknown(self.node)
        return [value, *rest[1:]] if isinstance(rest, list) else value

    def record(self, walk: Walk, ids: Vector, edit: Edit) -> None:
        """Note what removal changes in `normalized`."""
        if _gives_several(self.node):
            walk.edits.append(FirstResultAlone(self.normalized, ids, self.node, *_ALONE[self.node.target]))
        walk.edits.append(edit)

    def refused(self, walk: Walk, value: Value, first: int) -> Result:
        """The result where all channels from axis `first` on stay."""
        why = "normalized together, removal would change the statistics"
        if not _is_alone(self.node):
            why = "normalized together, and the statistics are read"
        value = walk.blur(self.node, value, range(first, value.rank), why)
        for operand in self.node.all_input_nodes[1:]:
            walk.pin_operand(self.node, operand, why)
        return self.results(walk, Value(value.axes))

    def constants(self, walk: Walk, value: Value, parts: Mapping[str, Value], shape: Sequence[int]) -> Value:
        """What is known of the result: the shift where the gain is zero, or where zeros are kept.

        Args:
            walk: of the graph.
            value: the input, axes as those of the result.
            parts: gain and shift.
            shape: theirs, to broadcast with the input.
        """
        if not walk.facts or not all(part.stored for part in parts.values()):
            return Value(value.axes)
        known = value.zeros if self.keeps_zeros else torch.zeros([1] * value.rank, dtype=torch.bool)
        facts = {name: part.facts.value.double().reshape(shape) for name, part in parts.items() if part.facts}
        if "weight" in facts:
            known = known | (facts["weight"] == 0)
        return settled(value.axes, known, facts.get("bias", torch.zeros(()).double()))


def _gives_several(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], list | tuple)


def _is_alone(node: fx.Node) -> bool:
    """Whether a call gives what it normalizes alone, or one node reads this and none its statistics."""
    if not _gives_several(node):
        return True
    users = list(node.users)
    return len(users) == 1 and users[0].target is operator.getitem and users[0].args[1:] == (0,)


# of calls that give their statistics as well, what gives the first result alone, and the arguments that it takes
_ALONE: Mapping[Any, tuple[Any, tuple[str, ...]]] = {
    aten.native_layer_norm.default: (aten.layer_norm.default, ("input", "normalized_shape", "weight", "bias", "eps")),
    aten._fused_rms_norm.default: (aten.rms_norm.default, ("input", "normalized_shape", "weight", "eps")),
    aten.native_group_norm.default: (aten.group_norm.default, ("input", "group", "weight", "bias", "eps")),
}


@register(aten.layer_norm, aten.rms_norm, aten.native_layer_norm, aten._fused_rms_norm)
@dataclass(frozen=True, eq=False)
class LayerNorm(_MixingNorm):
    """Over the last axes."""

    normalized_shape: list[Any]
    eps: float | None = None
    modules: ClassVar = (nn.LayerNorm, nn.RMSNorm)

    @property
    def keeps_zeros(self) -> bool:
        return self.node.target in (aten.rms_norm.default, aten._fused_rms_norm.default)

    def relate(self, walk: Walk) -> Result:
        value = walk.value(self.data)
        first = value.rank - len(self.normalized_shape)
        parts = {name: walk.value(node) for name, node in self.parts.items()}
        for dim in range(first, value.rank):
            axis = walk.join(self.node, [value.axes[dim], *(part.axes[dim - first] for part in parts.values())])
            if not axis.is_one:
                value = value.relayout(dim, axis)
                parts = {name: part.relayout(dim - first, axis) for name, part in parts.items()}
        over = [dim for dim in range(first, value.rank) if value.axes[dim].carries]
        if not over:
            return self._known(walk, value, parts)
        flat, ids = walk.merged(self.node, value, over[0])
        if len(over) > 1 or ids is None or not _is_alone(self.node):
            return self.refused(walk, value, first)
        counted(walk, self.node, flat, over[0], ids, key=self.key)
        walk.normalized.append(ids)
        self.record(walk, ids, self._edit(ids, over[0], first))
        return self._known(walk, value, parts)

    def _known(self, walk: Walk, value: Value, parts: Mapping[str, Value]) -> Result:
        shape = [1] * (value.rank - len(self.normalized_shape))
        shape += reduced_shape(value.axes[len(shape) :])
        result = self.constants(walk, value, parts, shape)
        return self.results(walk, self._with_constant_rows(walk, result, value, parts))

    def _with_constant_rows(self, walk: Walk, result: Value, data: Value, parts: Mapping[str, Value]) -> Value:
        """What is known of the result, and where every channel that is normalized together is known."""
        facts, is_one_axis = data.facts, len(self.normalized_shape) == 1
        if not walk.facts or facts is None or not is_one_axis or any(factor.ids is None for factor in data.axes[-1]):
            return result
        if not all(part.stored for part in parts.values()) or self.eps is None:
            return result
        known = facts.inner.all(-1, keepdim=True)
        values = torch.where(known, facts.value.double(), 0)
        centred = values if self.keeps_zeros else values - values.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
        scale, shift = (parts[name].facts if name in parts else None for name in ("weight", "bias"))
        normed = normed if scale is None else normed * scale.value.double()
        normed = normed if shift is None else normed + shift.value.double()
        return beside(result, known, normed)

    def _edit(self, ids: Vector, dim: int, first: int) -> Edit:
        operands = {"input": dim} | {name: dim - first for name in self.parts}
        padded = PadWithZeros(self.normalized, ids, operands, dim)
        gain = self.weight
        plain = self.keeps_zeros and len(self.normalized_shape) == 1 and self.eps is not None
        if not plain or gain is None or gain.op != "get_attr" or self.data.meta["val"].dtype not in _WIDE:
            return padded
        assert self.eps is not None
        return RootMeanSquare(self.normalized, ids, str(gain.target), self.normalized, "eps", self.eps, padded)

    @classmethod
    def module_sizes(cls, module: nn.Module) -> dict[str, Any]:
        weight = module.weight
        return {"normalized_shape": tuple(weight.shape)} if isinstance(weight, Tensor) else {}


# what holds a factor for gain and eps
_WIDE = (torch.float32, torch.float64)


@register(aten.group_norm, aten.native_group_norm)
@dataclass(frozen=True, eq=False)
class GroupNorm(_MixingNorm):
    """Over space and the channels of a group."""

    num_groups: int
    eps: float
    aliases: ClassVar = {"num_groups": ("num_groups", "group")}
    modules: ClassVar = (nn.GroupNorm,)

    def relate(self, walk: Walk) -> Result:
        value = walk.value(self.data)
        parts = {name: walk.value(node) for name, node in self.parts.items()}
        axis = walk.join(self.node, [value.axes[1], *(part.axes[0] for part in parts.values())])
        value = walk.blur(self.node, value.relayout(1, axis), range(2, value.rank), "statistics over it")
        parts = {name: part.relayout(0, axis) for name, part in parts.items()}
        flat, ids = walk.merged(self.node, value, 1)
        if ids is None or not _is_alone(self.node):
            return self.refused(walk, value, 1)
        counted(walk, self.node, flat, 1, ids, key=self.key, groups=self.num_groups)
        grouped = ids.reshape(self.num_groups, -1)
        if self.num_groups > 1 and grouped.shape[1] > 1:
            walk.equal_groups.append(grouped)
        operands = {"input": 1} | dict.fromkeys(self.parts, 0)
        self.record(walk, ids, GroupStatistics(self.normalized, grouped, operands))
        result = self.constants(walk, value, parts, [1, -1] + [1] * (value.rank - 2))
        if grouped.shape[1] == 1:
            self._note_means(walk, flat, parts)
        return self.results(walk, self._with_constant_groups(walk, result, flat, parts))

    def _note_means(self, walk: Walk, value: Value, parts: Mapping[str, Value]) -> None:
        """Groups of one channel have the shift as their mean over space, whatever comes in."""
        shift = parts.get("bias")
        if not walk.facts or not has_space(value.axes) or not all(part.stored for part in parts.values()):
            return
        mean = torch.zeros(()) if shift is None or shift.facts is None else shift.facts.value
        mean = mean.reshape([1, -1] + [1] * (value.rank - 2))
        walk.note_means(self.normalized, value, torch.ones((), dtype=torch.bool), mean)

    def _with_constant_groups(self, walk: Walk, result: Value, data: Value, parts: Mapping[str, Value]) -> Value:
        """What is known of the result, and the groups of which every channel is the same at all positions."""
        facts, count = data.facts, len(data.axes[1])
        shape = [] if facts is None else facts.value.shape
        if not walk.facts or facts is None or count != 1 or math.prod(shape) != shape[1]:
            return result
        if not all(part.stored for part in parts.values()):
            return result
        known = facts.inner.reshape(self.num_groups, -1).all(1, keepdim=True)
        values = facts.value.double().reshape(self.num_groups, -1)
        centred = values - values.mean(1, keepdim=True)
        normed = (centred / (centred.square().mean(1, keepdim=True) + self.eps).sqrt()).reshape(-1)
        scale, shift = (parts[name].facts if name in parts else None for name in ("weight", "bias"))
        normed = normed if scale is None else normed * scale.value.double().reshape(-1)
        normed = normed if shift is None else normed + shift.value.double().reshape(-1)
        where = known.expand(values.shape).reshape(shape)
        return beside(result, where, normed.reshape(shape))

    @classmethod
    def module_sizes(cls, module: nn.Module) -> dict[str, Any]:
        assert isinstance(module, nn.GroupNorm)
        if module.weight is None:
            return {}
        count = len(module.weight)
        return {"num_channels": count, "num_groups": module.num_groups * count // module.num_channels}
