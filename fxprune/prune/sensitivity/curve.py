"""A curve of one group: what the output loses against how many units went."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fxprune.prune.group_record import GroupRecord

Losses = NDArray[np.float64]

_NEXT_TO_NOTHING = 1e-13


@dataclass(frozen=True, eq=False)
class Curve(GroupRecord):
    """What the output loses without the units of one group, when what reads them makes up for it.

    Attributes:
        name, kind, size, members, units: as in `GroupRecord`.
        order: the units in the order in which they go, numbered as in the group.
        counts, measured: numbers of units, and what the output loses without the first so many, by the distance.
        local: by unit in `order`, what its readers lose with it: by how far the output moves with that, or, where
            that is not known, relative to the energy of their outputs.

    Example:
        >>> curve = fxprune.sensitivity(traced, batches).curves[0]
        >>> half = curve.losses()[curve.size // 2]
    """

    order: tuple[int, ...]
    counts: tuple[int, ...]
    measured: tuple[float, ...]
    local: tuple[float, ...]

    def losses(self) -> Losses:
        """What is lost without the first 0, 1, ... all units, float64 [size + 1].

        It never falls and is convex: the hull of what was measured, which between two points grows as the readers' own
        losses do.
        """
        local = np.concatenate([[0.0], np.cumsum(np.maximum(self.local, 1e-30))])
        counts = np.array([0, *self.counts])
        measured = np.maximum.accumulate(np.array([0.0, *self.measured]))
        found = np.empty(self.size + 1)
        for first, last, low, high in zip(counts[:-1], counts[1:], measured[:-1], measured[1:], strict=True):
            share = (local[first : last + 1] - local[first]) / (local[last] - local[first])
            found[first : last + 1] = low + share * (high - low)
        end = int(counts[-1])
        if end < self.size:  # beyond what was measured, as steeply as at its end, or as the readers lose
            steep = (measured[-1] - measured[-2]) / (local[end] - local[counts[-2]]) if end else 1.0
            found[end:] = measured[-1] + steep * (local[end:] - local[end])
        return _convex(found)

    def slopes(self) -> Losses:
        """By unit in the order of the group, what is lost with it, float64 [size].

        A unit that goes later has more, where the curve is straight by next to nothing: sorted, they are `order`.
        """
        steps = np.maximum.accumulate(np.diff(self.losses()))
        found = np.empty(self.size)
        found[list(self.order)] = steps + _NEXT_TO_NOTHING * (float(steps[-1]) or 1.0) * np.arange(self.size)
        return found


def _convex(values: Losses) -> Losses:
    """The largest convex function that is nowhere above the values."""
    hull: list[int] = []
    for place in range(len(values)):
        while len(hull) > 1 and _is_above(values, hull[-2], hull[-1], place):
            hull.pop()
        hull.append(place)
    found: Losses = np.interp(np.arange(len(values)), hull, values[hull])
    return found


def _is_above(values: Losses, first: int, middle: int, last: int) -> bool:
    return bool((values[middle] - values[first]) * (last - first) >= (values[last] - values[first]) * (middle - first))
