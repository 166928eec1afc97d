"""Which units of the channel groups go: scores of the groups, cut to a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fxprune.channels.alignment import fast_multiple
from fxprune.channels.groups import WHOLE_KINDS, ChannelGroup, Grouping, Scores, steps_of
from fxprune.channels.ids import Mask, Vector
from fxprune.errors import ArgumentError, PruningError

# what moving an element takes, in MACs: fitted to the layers of a MobileNetV2 in onnxruntime (one thread, AVX2)
MOVED = 11.0
# the score that a stair of another ladder may have at most, relative to the stair whose place it takes
ALIKE = 1.5


def slice_scores(grouping: Grouping, score: Callable[[str, int, str], torch.Tensor | None]) -> Scores:
    """For each class the mean over its unit's slices of a score of each slice.

    Args:
        grouping: the groups.
        score: from a parameter's name, axis and role to one score for each entry of the axis, None to leave it out.
    """
    count = grouping.found.classes.count
    total, slices = np.zeros(count), np.zeros(count)
    for axis in grouping.axes:
        value = score(axis.parameter, axis.axis, axis.role)
        if value is not None:
            vector = grouping.axes.vector(axis)
            total += np.bincount(vector, value.detach().double().cpu().numpy(), count)
            slices += np.bincount(vector, minlength=count)
    total, slices = grouping.units.sums(total), grouping.units.sums(slices)
    return np.divide(total, slices, out=np.zeros(count), where=slices > 0)


@dataclass(frozen=True)
class Rounding:
    """How many units of a group stay.

    Attributes:
        to: "auto" and "fine" are multiples that run fast for convolutions, 1 elsewhere; an integer, its multiples.
        most: largest share of the steps that is taken.
        least: units that every group keeps.
        timed: a group whose MACs take more time than the average ends a multiple below the nearest, one whose take
            less a multiple above it: the same MACs in less time.
    """

    to: int | str
    most: float
    least: int
    timed: bool = False

    def multiple(self, group: ChannelGroup) -> int:
        """What the number of units that stay should be a multiple of; with heads, that of the channels within."""
        if group.kind in WHOLE_KINDS:
            return 1
        if isinstance(self.to, int):
            return self.to
        return fast_multiple(group.size, fine=self.to == "fine") if group.aligned else 1

    def steps_taken(self, groups: Sequence[ChannelGroup], steps: int, lean: float) -> Vector:
        """How many steps are taken when 1, 2, ... are asked for.

        Args:
            groups: those that lose units together.
            steps: how many there are.
            lean: multiples more (1) or fewer (-1) than the nearest that stay.
        """
        stays = max(1, math.ceil(self.least * steps / min(g.size for g in groups)))
        most = max(0, min(math.floor(self.most * steps + 1e-9), steps - stays))
        multiples = [self.multiple(group) for group in groups]
        shares = [max(1, int(group.share[0])) for group in groups]
        multiple = min(m // math.gcd(m, share) for m, share in zip(multiples, shares, strict=True))
        wanted = np.minimum(np.arange(1, steps + 1), most)
        left = multiple * np.maximum(1, np.floor((steps - wanted) / multiple + 0.5 + lean)).astype(np.int64)
        fewest = -(-(steps - most) // multiple) * multiple
        left = np.where(steps - left > most, fewest, left)
        return np.where(left >= steps, 0, steps - left)


class Ladder:
    """The order in which groups that are cut together lose their units.

    A group of 8 units without others is a ladder of 8 steps of one unit each, the lowest score first. Rounded to 4, it
    takes 0 or 4 steps: 0, 0, 4, 4, 4, 4, 4, 4 where 1, 2, ... 8 are asked for, the nearest multiple that leaves one.

    Args:
        groups: the groups.
        scores: for each a score of its units.
        rounding: how many stay; lean: as in `Rounding.steps_taken`.

    Attributes:
        units: [steps, width], the units that go with each step.
        scores: the mean score of each step.
        taken: how many steps are taken when 1, 2, ... are asked for.
    """

    def __init__(
        self, groups: Sequence[ChannelGroup], scores: Sequence[Scores], rounding: Rounding, lean: float = 0.0
    ) -> None:
        self.units = steps_of(groups, scores)
        self.steps, self.width = self.units.shape
        every = np.concatenate([group.units for group in groups])
        value = np.zeros(int(every.max()) + 1)
        value[every] = np.concatenate(scores)
        self.scores: Scores = value[self.units].mean(1)
        self.taken: Vector = rounding.steps_taken(groups, self.steps, lean)


def ladders(
    groups: Sequence[ChannelGroup], scores: Sequence[Scores], round_to: int | str, most: float, least: int,
    timed: bool = False,
) -> list[Ladder]:  # fmt: skip
    """The ladders of the groups, one for those that must be cut together; checks scores and rounding.

    Args:
        groups: the groups to cut.
        scores: for each a score of its units.
        round_to, most, least, timed: as in `Rounding`.

    Raises:
        PruningError: a score is NaN or infinite.
        ArgumentError: a group has fewer units than the multiple.
    """
    rounding = Rounding(round_to, most, least, timed)
    for group, score in zip(groups, scores, strict=True):
        _check(group, score, round_to)
    together: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        together.setdefault(group.block if group.block >= 0 else -1 - i, []).append(i)
    average = _slowness(groups)
    found = []
    for index in together.values():
        own = [groups[i] for i in index]
        lean = math.copysign(1, average - _slowness(own)) if timed and isinstance(round_to, str) else 0.0
        found.append(Ladder(own, [scores[i] for i in index], rounding, lean))
    return found


def _check(group: ChannelGroup, score: Scores, round_to: int | str) -> None:
    if not np.isfinite(score).all():
        raise PruningError(f"the importance of {group.name!r} ({group.kind}) is NaN or inf; no mask was inserted.")
    if isinstance(round_to, int) and round_to > group.size and group.kind not in WHOLE_KINDS:
        raise ArgumentError(
            f"round_to={round_to} is more than the {group.size} units of {group.name!r} ({group.kind}). "
            'Choose a smaller one, "auto", or put it into `ignore`.'
        )


def _slowness(groups: Sequence[ChannelGroup]) -> float:
    """The time that groups take, in MACs, for each of their MACs."""
    macs = sum(group.macs * group.size for group in groups)
    return (macs + MOVED * sum(group.traffic * group.size for group in groups)) / max(macs, 1)


class Staircase:
    """All steps of the ladders in one order, each stair a choice of units that holds the one before.

    Scope "global" orders by score, "local" takes the same share of every ladder at a time; scores that tie are taken
    like local ones. Only steps that take something, once rounded, are stairs: two ladders of 8 units, rounded to 4,
    make two stairs, one of each ladder.

    Example:
        >>> stairs = Staircase(ladders(groups, scores, round_to=4, most=1.0, least=1), "global")
        >>> len(stairs), stairs.total, stairs.units(1)
        (2, 16, array([0, 1, 2, 3]))
    """

    def __init__(self, found: Sequence[Ladder], scope: str) -> None:
        self._ladders = found
        which = np.repeat(np.arange(len(found)), [ladder.steps for ladder in found])
        share = np.concatenate([(np.arange(ladder.steps) + 0.5) / ladder.steps for ladder in found])
        level = np.concatenate([ladder.scores for ladder in found]) if scope == "global" else share
        order = np.lexsort((share, level))
        before = np.concatenate([[0, *ladder.taken[:-1]] for ladder in found])
        taken = np.concatenate([ladder.taken for ladder in found])
        self._sizes = np.cumsum(np.array([ladder.width for ladder in found])[which][order])
        self._rank = np.flatnonzero(taken[order] > before[order])
        # by stair: its ladder, the steps of it taken before and then, its score
        self._which, self._before, self._taken, self._score = (
            values[order][self._rank] for values in (which, before, taken, level)
        )

    def __len__(self) -> int:
        return len(self._rank)

    @property
    def total(self) -> int:
        """The number of units."""
        return int(self._sizes[-1])

    def count(self, units: float) -> int:
        """The number of stairs when so many units are asked for."""
        cut = np.searchsorted(self._sizes, units + 0.5, "left")
        return int(np.searchsorted(self._rank, cut))

    def units(self, stairs: int) -> Vector:
        """The units that go with the first stairs."""
        return self._units(self._levels(stairs))

    def search(self, fits: Callable[[Vector], bool]) -> int | None:
        """The fewest stairs that fit, None where all of them do not."""
        low, high = -1, len(self)
        if not fits(self.units(high)):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(self.units(middle)) else (middle, high)
        return high

    def fill(self, stairs: int, left: Callable[[Vector], int], limit: float) -> Vector:
        """The units that leave the most within a limit, which the first stairs keep and one fewer do not.

        The last stair, or the best next one of another ladder whose score is alike, without what need not be taken
        then.
        """
        if not stairs:
            return self.units(0)
        exchanged = self._exchanged(stairs, left, limit)
        choices = [self._spared(levels, stairs - 1, left, limit) for levels in (self._levels(stairs), exchanged)]
        return max(choices, key=left)

    def _exchanged(self, stairs: int, left: Callable[[Vector], int], limit: float) -> Vector:
        """The levels of all but the last stair, and of the next one that leaves the most within the limit."""
        levels, last = self._levels(stairs - 1), stairs - 1
        following = np.unique(self._which[last:], return_index=True)[1] + last  # the next stair of every ladder
        worth = self._score[last]
        following = following[self._score[following] <= max(worth, ALIKE * worth)]
        best, chosen = -1, last
        for stair in following.tolist():
            remaining = left(self._units(self._at(levels, stair, self._taken)))
            if best <= remaining <= limit:
                best, chosen = remaining, stair
        return self._at(levels, chosen, self._taken)

    def _spared(self, levels: Vector, stairs: int, left: Callable[[Vector], int], limit: float) -> Vector:
        """The units of some levels without the last stairs of ladders, the latest first, that need not be taken."""
        latest = dict(zip(self._which[:stairs].tolist(), range(stairs), strict=True))
        for stair in sorted(latest.values(), reverse=True):
            fewer = self._at(levels, stair, self._before)
            if left(self._units(fewer)) <= limit:
                levels = fewer
        return self._units(levels)

    def _at(self, levels: Vector, stair: int, steps: Vector) -> Vector:
        """Levels with that of one stair's ladder as it is before or after the stair."""
        changed = levels.copy()
        changed[self._which[stair]] = steps[stair]
        return changed

    def _levels(self, stairs: int) -> Vector:
        """How many steps of each ladder the first stairs are."""
        taken = np.zeros(len(self._ladders), np.int64)
        np.maximum.at(taken, self._which[:stairs], self._taken[:stairs])
        return taken

    def _units(self, levels: Vector) -> Vector:
        return np.concatenate([x.units[:n].reshape(-1) for x, n in zip(self._ladders, levels, strict=True)])


def masks(grouping: Grouping, alive: Mask) -> dict[str, torch.Tensor]:
    """For each parameter that holds a dead class its mask, boolean."""
    dead = [bool((~alive[vector]).any()) for vector in grouping.axes.vectors]
    found: dict[str, torch.Tensor] = {}
    for axis in grouping.axes:
        if dead[axis.vector]:
            shape = grouping.plain.get_parameter(axis.parameter).shape
            mask = found.setdefault(axis.parameter, torch.ones(shape, dtype=torch.bool))
            grouping.axes.clear(axis, mask, alive)
    return found
