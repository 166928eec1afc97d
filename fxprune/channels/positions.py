"""Constants of positions: what a padded or transposed convolution, or a shuffle of pixels, makes of constant channels.

And what is computed from that alone.

Zeros around a constant channel make a map of it: at the border some taps fall on zeros. How many, before and after,
is all that a position has to do with it, so the map has one value for each pair of these counts along every axis of
space, whatever the size. A `Conv2d(1, 1, 3, padding=1)` with taps of one makes 2 of a 1 in every corner and 3 at the
edges of a single row, 4 in a corner and 9 inside of a larger image.

What spreads positions has values by phase besides: which of the positions it is that come of one. Who reads positions
in steps of as many meets one phase alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

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
    def period(self) -> int:
        """How many phases there are."""
        return 1

    @property
    def phases(self) -> list[int]:
        """By pair the phase of the positions that have it."""
        return [0] * self.count

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


@dataclass(frozen=True)
class Spread:
    """A transposed convolution along one axis of space.

    Attributes:
        taps, period, dilation: of the kernel; the period is its stride.
        padding: what is cut off on either side.
        extra: what is added behind.
    """

    taps: int
    period: int
    dilation: int
    padding: int
    extra: int

    @property
    def count(self) -> int:
        """The number of pairs (phase, taps that are met), of all that occur at any size."""
        return len(_met(self))

    @property
    def phases(self) -> list[int]:
        return [phase for phase, _ in _met(self)]

    def inside(self) -> Tensor:
        """[pairs, taps], 1 for a tap that is met, else 0."""
        found = torch.zeros(self.count, self.taps).double()
        for pair, (_, taps) in enumerate(_met(self)):
            found[pair, list(taps)] = 1
        return found


@functools.cache
def _met(spread: Spread) -> list[tuple[int, tuple[int, ...]]]:
    """The phases of positions, each with the taps that fall on something; larger inputs have no others."""
    reach, found = spread.dilation * (spread.taps - 1), set()
    for size in range(1, 2 * (reach // spread.period + 2) + 2):
        for position in range((size - 1) * spread.period + reach + 1 + spread.extra - 2 * spread.padding):
            distances = [position + spread.padding - tap * spread.dilation for tap in range(spread.taps)]
            taps = [
                tap
                for tap, distance in enumerate(distances)
                if distance % spread.period == 0 and 0 <= distance // spread.period < size
            ]
            found.add((position % spread.period, tuple(taps)))
    return sorted(found)


@dataclass(frozen=True)
class Pixels:
    """Along one axis of space the pixels that a shuffle makes of one position."""

    period: int

    @property
    def count(self) -> int:
        return self.period

    @property
    def phases(self) -> list[int]:
        return list(range(self.period))


Places: TypeAlias = Window | Spread | Pixels


@dataclass(frozen=True, eq=False)
class PositionMaps:
    """Channels that are the same for every input but not at every position.

    Attributes:
        source: the convolution whose border it is, or the shuffle.
        windows: its windows, one an axis of space.
        where: [channels], which of them are.
        values: [pairs of all windows, channels], float64.
    """

    source: fx.Node
    windows: tuple[Places, ...]
    where: Tensor
    values: Tensor

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this reduced shape has these channels, on axis 1, and nothing else."""
        return len(shape) > 1 and [*shape[:1], len(self.where), *shape[2:]] == [1, shape[1], *[1] * (len(shape) - 2)]

    @property
    def border(self) -> tuple[Window, ...] | None:
        """The windows of a padded convolution; None where the maps are of something else."""
        found = tuple(window for window in self.windows if isinstance(window, Window))
        return found if len(found) == len(self.windows) else None

    def met(self, steps: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Which channels have one value wherever these steps from the first position lead, and their values."""
        axes = [
            torch.tensor([step % window.period != 0 or phase == 0 for phase in window.phases]).long()
            for window, step in zip(self.windows, steps, strict=True)
        ]
        values = self.values[functools.reduce(torch.kron, axes).bool()]
        return self.where & (values == values[:1]).all(0), values[0]

    def means(self, windows: Sequence[int] | None) -> Tensor | None:
        """The means over windows that tile space, or over all of it; None where these are not the same everywhere."""
        if not all(isinstance(window, Pixels) for window in self.windows):
            return None
        sizes = [0] * len(self.windows) if windows is None else windows
        sizes = [*sizes] * len(self.windows) if len(sizes) == 1 else sizes
        is_whole = all(size % window.period == 0 for size, window in zip(sizes, self.windows, strict=True))
        return self.values.mean(0) if is_whole else None

    def laid(self, rank: int) -> tuple[Tensor, Tensor]:
        """`where` and `values` as tensors of this rank with channels on axis 1; the pairs take the place of a batch."""
        rest = [1] * (rank - 2)
        return self.where.view(1, -1, *rest), self.values.view(len(self.values), -1, *rest)


def inside(windows: Sequence[Window | Spread]) -> Tensor:
    """[pairs, taps] over all axes of space, row-major, 1 for a tap that falls on no zero."""
    return functools.reduce(torch.kron, [window.inside() for window in windows])


def number(windows: Sequence[Places]) -> int:
    """The number of values that a map has."""
    return functools.reduce(lambda count, window: count * window.count, windows, 1)
