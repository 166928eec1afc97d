"""Tensors that depend on no input but its shape."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxprune.channels.axes import Axis
from fxprune.channels.edits import Extent, SetArguments
from fxprune.channels.registry import OperatorCall, register
from fxprune.channels.values import Value, settled
from fxprune.channels.walk import DRAWS, Result, Walk

aten = torch.ops.aten
# longer axes hold no channels
_MOST_IDS = 1 << 14
_FILLS = {
    aten.zeros: 0, aten.new_zeros: 0, aten.zeros_like: 0, aten.ones: 1, aten.new_ones: 1, aten.ones_like: 1,
}  # fmt: skip


def _filled(walk: Walk, node: fx.Node, axes: tuple[Axis, ...], fill: Any) -> Value:
    """A value that is one finite number everywhere; nothing is known of others."""
    fill = _FILLS.get(node.target.overloadpacket, fill)  # type: ignore[union-attr]
    if not walk.facts or not isinstance(fill, int | float) or not math.isfinite(fill):
        return Value(axes)
    one = torch.ones([1] * len(axes))
    return settled(axes, one.bool(), one.double() * fill)


@register(
    aten.zeros, aten.ones, aten.full, aten.empty, aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty,
    aten.rand, aten.randn,
)  # fmt: skip
@dataclass(frozen=True, eq=False)
class Creation(OperatorCall):
    """A new tensor of a given size, whose axes follow what they meet."""

    size: list[Any]
    fill_value: Any = None

    def relate(self, walk: Walk) -> Result:
        if walk.draws(self.node):
            return walk.refuse(self.node, DRAWS)
        axes = tuple(
            Axis.of(walk.ids.fresh(size)) if type(size) is int and 1 < size <= _MOST_IDS else Axis.plain(size)
            for size in walk.shape(self.node)
        )
        resize(walk, self.node, "size", self.size, axes)
        return _filled(walk, self.node, axes, self.fill_value)


@register(
    aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.rand_like, aten.randn_like, aten.bernoulli,
)  # fmt: skip
@dataclass(frozen=True, eq=False)
class CreationLike(OperatorCall):
    """A new tensor of another one's size."""

    data: fx.Node
    fill_value: Any = None

    def relate(self, walk: Walk) -> Result:
        if walk.draws(self.node):
            return walk.refuse(self.node, DRAWS)
        return _filled(walk, self.node, walk.value(self.data).axes, self.fill_value)


@register(aten.arange, aten.scalar_tensor, aten.linspace, aten.eye, aten.tril_indices, aten.triu_indices)
@dataclass(frozen=True, eq=False)
class Positions(OperatorCall):
    """Numbers that stand for positions, which have no channels."""

    def relate(self, walk: Walk) -> Result:
        return walk.unknown(self.node)


def resize(walk: Walk, node: fx.Node, name: str, sizes: list[Any], axes: list[Axis] | tuple[Axis, ...]) -> None:
    """Have the literal sizes in the argument `name` follow what remains of `axes`."""
    if any(axis.carries for axis in axes):
        wanted = [Extent(size, axis) for size, axis in zip(sizes, axes, strict=False)]
        walk.edits.append(SetArguments(node, {name: [*wanted, *sizes[len(wanted) :]]}))
