"""Constants of positions: what a padded convolution makes of constant channels, and what is computed from that alone.

Zeros around a constant channel make a map of it: at the border some taps fall on zeros. How many, before and after,
is all that a position has to do with it, so the map has one value for each pair of these counts along every axis of
space, whatever the size. A `Conv2d(1, 1, 3, padding=1)` with taps of one makes 2 of a 1 in every corner and 3 at the
edges of a single row, 4 in a corner and 9 inside of a larger image.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

MOST = 1024  # values of a map


@dataclass(frozen=True)
class Window:
    """A convolution along one axis of space.

    Attributes:
        taps, stride, dilation: of the kernel.
        before, after: the zeros on either side.
    """

    taps: int
    stride: int
    dilation: int
    before: int
    after: int

    @property
    def is_each(self) -> bool:
        """Whether every position is read by itself, and gives one."""
        return self.taps == self.stride == 1 and not self.before and not self.after

    @property
    def low(self) -> int:
        """How many taps fall on the zeros before, at most."""
        return min(self.taps, -(-self.before // self.dilation))

    @property
    def high(self) -> int:
        """How many taps fall on the zeros after, at most."""
        return min(self.taps, -(-self.after // self.dilation))

    @property
    def count(self) -> int:
        """The number of pairs (taps on the zeros before, after); a pair's place is before * (high + 1) + after."""
        return (self.low + 1) * (self.high + 1)

    def inside(self) -> Tensor:
        """[pairs, taps], 1 for a tap that falls on no zero, else 0."""
        tap, rest = torch.arange(self.taps), torch.arange(self.taps).flip(0)
        low, high = torch.arange(self.low + 1), torch.arange(self.high + 1)
        found = (tap >= low[:, None, None]) & (rest >= high[None, :, None])
        return found.double().reshape(self.count, self.taps)


@dataclass(frozen=True, eq=False)
class PositionMaps:
    """Channels that are the same for every input but not at every position.

    Attributes:
        source: the padded convolution whose border it is.
        windows: its windows, one an axis of space.
        where: [channels], which of them are.
        values: [pairs of all windows, channels], float64.
    """

    source: fx.Node
    windows: tuple[Window, ...]
    where: Tensor
    values: Tensor

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this reduced shape has these channels, on axis 1, and nothing else."""
        return len(shape) > 1 and [*shape[:1], len(self.where), *shape[2:]] == [1, shape[1], *[1] * (len(shape) - 2)]

    def laid(self, rank: int) -> tuple[Tensor, Tensor]:
        """`where` and `values` as tensors of this rank with channels on axis 1; the pairs take the place of a batch."""
        rest = [1] * (rank - 2)
        return self.where.view(1, -1, *rest), self.values.view(len(self.values), -1, *rest)


def inside(windows: Sequence[Window]) -> Tensor:
    """[pairs, taps] over all axes of space, row-major, 1 for a tap that falls on no zero."""
    return functools.reduce(torch.kron, [window.inside() for window in windows])


def number(windows: Sequence[Window]) -> int:
    """The number of values that a map has."""
    return functools.reduce(lambda count, window: count * window.count, windows, 1)
