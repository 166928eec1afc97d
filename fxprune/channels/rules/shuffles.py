"""Data movement between channels and space: shuffles of pixels and channels, patches."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxprune.channels.axes import Axis, Factor, Size, reduced_shape
from fxprune.channels.means import has_space
from fxprune.channels.positions import Pixels, PositionMaps
from fxprune.channels.registry import OperatorCall, register
from fxprune.channels.rules.views import regrouped
from fxprune.channels.values import Value, settled
from fxprune.channels.walk import Result, Walk

aten = torch.ops.aten


def _split_channels(walk: Walk, value: Value, dim: int, outer: Size, inner: Size) -> Value | None:
    """`value` with an axis as two, None where its factors do not allow it."""
    parts = regrouped(walk, value.axes[dim].factors, [outer, inner])
    if parts is None:
        return None
    axes = value.replaced_axis(dim, *parts)
    return value.moved(axes, lambda tensor: tensor.reshape(reduced_shape(axes)))


def _space(walk: Walk, node: fx.Node, dim: int) -> list[Axis]:
    """The axes of the result behind `dim`."""
    return [Axis.plain(size) for size in walk.shape(node)[dim + 1 :]]


@register(aten.pixel_shuffle)
@dataclass(frozen=True, eq=False)
class PixelShuffle(OperatorCall):
    """The inner part of the channels becomes positions within a pixel."""

    data: fx.Node
    upscale_factor: int

    def relate(self, walk: Walk) -> Result:
        value = walk.value(self.data)
        dim, positions = value.rank - 3, self.upscale_factor**2
        value = walk.blur(self.node, value, range(dim + 1, value.rank), "space of a shuffle")
        split = _split_channels(walk, value, dim, value.axes[dim].size // positions, positions)
        if split is None:
            return walk.refuse(self.node, "regroups the channels")
        within = split.facts
        split = walk.blur(self.node, split, [dim + 1], "positions within a pixel")
        axes = [*split.axes[: dim + 1], *_space(walk, self.node, dim)]
        result = split.moved(axes, lambda tensor: tensor.squeeze(dim + 1))
        if within is not None and dim == 1 and has_space(axes):
            pixels = within.value.expand([1, within.value.shape[1], positions, 1, 1]).double()
            windows = (Pixels(self.upscale_factor), Pixels(self.upscale_factor))
            where, values = within.inner.all(2), pixels[0, :, :, 0, 0].T
            maps = PositionMaps(self.node, windows, where.reshape(-1), values)
            return walk.note_maps(self.node, result, maps, *maps.laid(4))
        return result


@register(aten.pixel_unshuffle)
@dataclass(frozen=True, eq=False)
class PixelUnshuffle(OperatorCall):
    """Positions within a pixel become the inner part of the channels."""

    data: fx.Node
    downscale_factor: int

    def relate(self, walk: Walk) -> Result:
        value = walk.value(self.data)
        dim = value.rank - 3
        value = walk.blur(self.node, value, range(dim + 1, value.rank), "space of a shuffle")
        channels = Axis((*value.axes[dim].factors, Factor(self.downscale_factor**2)))
        axes = [*value.axes[:dim], channels, *_space(walk, self.node, dim)]
        return value.moved(axes, lambda tensor: tensor.reshape(reduced_shape(axes)))


@register(aten.channel_shuffle, aten.native_channel_shuffle)
@dataclass(frozen=True, eq=False)
class ChannelShuffle(OperatorCall):
    """Channels of all groups in turns."""

    data: fx.Node
    groups: int

    def relate(self, walk: Walk) -> Result:
        value = walk.value(self.data)
        value = walk.blur(self.node, value, range(2, value.rank), "space of a shuffle")
        split = _split_channels(walk, value, 1, self.groups, value.axes[1].size // self.groups)
        if split is None:
            return walk.refuse(self.node, "regroups the channels")
        walk.pin_axis(self.node, split.axes[1], "groups of a shuffle")
        axes = [split.axes[0], split.axes[2] + split.axes[1], *_space(walk, self.node, 1)]
        return split.moved(axes, lambda tensor: tensor.transpose(1, 2).reshape(reduced_shape(axes)))


@register(aten.im2col)
@dataclass(frozen=True, eq=False)
class Patches(OperatorCall):
    """The window around every position as a column: [batch, channels x window, positions]."""

    data: fx.Node
    kernel_size: list[int]
    padding: Any = (0,)

    def relate(self, walk: Walk) -> Value:
        value = walk.value(self.data)
        dim = value.rank - 3
        value = walk.blur(self.node, value, [dim + 1, dim + 2], "space of a convolution")
        channels = Axis((*value.axes[dim].factors, Factor(math.prod(self.kernel_size))))
        axes = [*value.axes[:dim], channels, Axis.plain(walk.shape(self.node)[-1])]
        columns = value.moved(axes, lambda tensor: tensor.squeeze(-1))
        if any(self.padding) and columns.facts is not None:
            zeros = replace(columns.facts, where=columns.facts.zeros, stored=False)
            return replace(columns, facts=zeros)
        return columns


@register(aten.col2im)
@dataclass(frozen=True, eq=False)
class PatchesAdded(OperatorCall):
    """Columns of windows added at their positions: [batch, channels x window, positions] as an image."""

    data: fx.Node
    output_size: list[Any]
    kernel_size: list[int]

    def relate(self, walk: Walk) -> Result:
        value = walk.value(self.data)
        dim, window = value.rank - 2, math.prod(self.kernel_size)
        value = walk.blur(self.node, value, [dim + 1], "positions of windows")
        split = _split_channels(walk, value, dim, value.axes[dim].size // window, window)
        if split is None:
            return walk.refuse(self.node, "regroups the channels")
        split = walk.blur(self.node, split, [dim + 1], "positions within a window")
        axes = [*split.axes[: dim + 1], *_space(walk, self.node, dim)]
        zeros = split.zeros.squeeze(dim + 1).unsqueeze(-1)
        return settled(axes, zeros, torch.zeros(()))
