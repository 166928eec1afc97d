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
# what a budget larger by this factor takes is not given back to use up a smaller one: in steps, both take the same
NESTED = 1.1


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
    """

    to: int | str
    most: float
    least: int

    def multiple(self, group: ChannelGroup) -> int:
        """What the number of units that stay should be a multiple of; with heads, that of the channels within."""
        if group.kind in WHOLE_KINDS:
            return 1
        if isinstance(self.to, int):
            return self.to
        return fast_multiple(group.size, fine=self.to == "fine") if group.aligned else 1

    def multiple_of_steps(self, groups: Sequence[ChannelGroup]) -> int:
        """What the number of steps that are left should be a multiple of, of groups that lose units together."""
        multiples = [self.multiple(group) for group in groups]
        shares = [max(1, int(group.share[0])) for group in groups]
        return min(m // math.gcd(m, share) for m, share in zip(multiples, shares, strict=True))

    def steps_taken(self, groups: Sequence[ChannelGroup], steps: int, lean: float) -> Vector:
        """How many steps are taken when 1, 2, ... are asked for.

        Args:
            groups: those that lose units together.
            steps: how many there are.
            lean: multiples more (1) or fewer (-1) than the nearest that stay.
        """
        stays = max(1, math.ceil(self.least * steps / min(g.size for g in groups)))
        most = max(0, min(math.floor(self.most * steps + 1e-9), steps - stays))
        multiple = self.multiple_of_steps(groups)
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
        roundings: how many stay, coarse ones first: each goes on where the one before ends.
        lean: as in `Rounding.steps_taken`, for the first of them where it rounds at all.
        gone: for each group which of its units are masked; these go first.

    Attributes:
        units: [steps, width], the units that go with each step.
        scores: the mean score of each step.
        taken: for each rounding how many steps are taken when 1, 2, ... are asked for.
        multiples: for each rounding what the steps that are left are a multiple of.
    """

    def __init__(
        self,
        groups: Sequence[ChannelGroup],
        scores: Sequence[Scores],
        roundings: Sequence[Rounding],
        lean: float = 0.0,
        gone: Sequence[Mask] = (),
    ) -> None:
        order = (
            [score - dead * (np.ptp(score) + 1) for score, dead in zip(scores, gone, strict=True)] if gone else scores
        )
        self.units = steps_of(groups, order)
        self.steps, self.width = self.units.shape
        every = np.concatenate([group.units for group in groups])
        value = np.zeros(int(every.max()) + 1)
        value[every] = np.concatenate(scores)
        # what is gone goes first, whatever its values are now
        self.scores: Scores = np.minimum.accumulate(value[self.units].mean(1)[::-1])[::-1]
        self.multiples = [rounding.multiple_of_steps(groups) for rounding in roundings]
        self.taken: list[Vector] = []
        for rounding in roundings:
            leans = not self.taken and self.multiples[0] > 1
            own = rounding.steps_taken(groups, self.steps, lean if leans else 0.0)
            self.taken.append(np.maximum(own, self.taken[-1].max()) if self.taken else own)


def ladders(
    groups: Sequence[ChannelGroup], scores: Sequence[Scores], round_to: int | Sequence[int | str], most: float,
    least: int, timed: bool = False, gone: Sequence[Mask] = (),
) -> list[Ladder]:  # fmt: skip
    """The ladders of the groups, one for those that must be cut together; checks scores and rounding.

    Args:
        groups: the groups to cut.
        scores: for each a score of its units.
        round_to: a multiple; or roundings as in `Rounding`, each to go on with where the one before ends.
        most, least: as in `Rounding`.
        timed: under the first rounding, if it is "auto", a group whose MACs take more time than the average ends a
            multiple below the nearest, one whose take less a multiple above it: the same MACs in less time.
        gone: as in `Ladder`.

    Raises:
        PruningError: a score is NaN or infinite.
        ArgumentError: a group has fewer units than the multiple.
    """
    phases = (round_to,) if isinstance(round_to, int) else round_to
    for group, score in zip(groups, scores, strict=True):
        _check(group, score, phases[0])
    roundings = [Rounding(to, most, least) for to in phases]
    together: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        together.setdefault(group.block if group.block >= 0 else -1 - i, []).append(i)
    average = _slowness(groups)
    found = []
    for index in together.values():
        own = [groups[i] for i in index]
        lean = math.copysign(1, average - _slowness(own)) if timed and phases[0] == "auto" else 0.0
        found.append(Ladder(own, [scores[i] for i in index], roundings, lean, [gone[i] for i in index if gone]))
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
    make two stairs, one of each ladder. Stairs of a finer rounding follow all those of the coarser one.

    The order does not depend on how far it is followed: what a small budget takes, a larger one takes too.

    Example:
        >>> stairs = Staircase(ladders(groups, scores, round_to=4, most=1.0, least=1), "global")
        >>> len(stairs), stairs.units(1)
        (2, array([0, 1, 2, 3]))
    """

    def __init__(self, found: Sequence[Ladder], scope: str) -> None:
        self._ladders = found
        which = np.repeat(np.arange(len(found)), [ladder.steps for ladder in found])
        share = np.concatenate([(np.arange(ladder.steps) + 0.5) / ladder.steps for ladder in found])
        level = np.concatenate([ladder.scores for ladder in found]) if scope == "global" else share
        order = np.lexsort((share, level))
        parts = []
        for phase in range(len(found[0].taken)):
            start = [0 if phase == 0 else int(ladder.taken[phase - 1].max()) for ladder in found]
            before = np.concatenate([[s, *x.taken[phase][:-1]] for s, x in zip(start, found, strict=True)])
            taken = np.concatenate([ladder.taken[phase] for ladder in found])
            rank = order[taken[order] > before[order]]
            multiple = np.array([ladder.multiples[phase] for ladder in found])[which]
            parts.append(np.stack([which[rank], taken[rank], multiple[rank]]))
        # by stair: its ladder, the steps of it that are taken then, the multiple that is left
        self._which, self._taken, self._multiple = np.concatenate(parts, axis=1)

    def __len__(self) -> int:
        return len(self._which)

    def units(self, stairs: int) -> Vector:
        """The units that go with the first stairs."""
        return self._units(self._levels(stairs))

    def search(self, fits: Callable[[Vector], bool]) -> int | None:
        """The fewest stairs that fit, None where all of them do not."""
        return self._search(fits, self._levels(0))

    def _search(self, fits: Callable[[Vector], bool], lowest: Vector) -> int | None:
        low, high = -1, len(self)
        if not fits(self._units(np.maximum(self._levels(high), lowest))):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            found = fits(self._units(np.maximum(self._levels(middle), lowest)))
            low, high = (low, middle) if found else (middle, high)
        return high

    def land(
        self, left: Callable[[Vector], float], limits: Sequence[float], spent: float, finer: Sequence[int]
    ) -> Vector | None:
        """The units of the fewest stairs that leave no more than a limit, without those that need not go for that.

        Where whole stairs leave less than the share `spent` of it, units of the last one are given back, in multiples
        that run fast if that is enough, else one by one; then units of other ladders, the latest first, where one of
        the last ladder is too much.

        Args:
            left: from a choice of units to what they leave.
            limits: the most that may be left, last; before it larger ones, descending: what they take is not given
                back, so that it does not matter whether they were asked for before.
            spent: the share of a limit that uses it up.
            finer: the multiples in which units are given back, descending, where those of the stairs are too coarse.

        Returns:
            The units, None where all stairs leave more than the limit.
        """
        levels = self._levels(0)
        for limit in limits:
            found = self._landed(levels, left, limit, spent * limit, finer, alone=len(limits) == 1)
            if found is None:
                return None
            levels = found
        return self._units(levels)

    def _landed(
        self, lowest: Vector, left: Callable[[Vector], float], limit: float, least: float, finer: Sequence[int],
        alone: bool,
    ) -> Vector | None:  # fmt: skip
        """The levels for one limit, no lower than the `lowest`."""
        height = self._search(lambda units: left(units) <= limit, lowest)
        if not height:
            return None if height is None else lowest
        levels = np.maximum(self._levels(height), lowest)
        if left(self._units(levels)) < least:
            levels = self._given_back(levels, height - 1, lowest, left, limit, least, finer)
        if left(self._units(levels)) >= least:
            return levels
        if alone:
            earlier = self.search(lambda units: left(units) <= NESTED * limit)
            assert earlier is not None
            lowest = np.minimum(self._levels(earlier), levels)
        latest = dict(zip(self._which[: height - 1].tolist(), range(height - 1), strict=True))
        latest.pop(int(self._which[height - 1]), None)
        for stair in sorted(latest.values(), reverse=True):
            levels = self._given_back(levels, stair, lowest, left, limit, least, finer)
            if left(self._units(levels)) >= least:
                break
        return levels

    def _given_back(
        self, levels: Vector, stair: int, lowest: Vector, left: Callable[[Vector], float], limit: float, least: float,
        finer: Sequence[int],
    ) -> Vector:  # fmt: skip
        """Levels with as many steps of a stair's ladder given back as the limit allows, in the coarsest multiples that
        use it up; no further than to the `lowest` levels."""
        ladder, multiple = int(self._which[stair]), int(self._multiple[stair])
        found = levels
        for each in [m for m in finer if m < multiple and multiple % m == 0] or [multiple]:
            fewest, most = 0, int(levels[ladder] - lowest[ladder]) // each

            def at(times: int, each: int = each) -> Vector:
                changed = levels.copy()
                changed[ladder] -= each * times
                return changed

            while fewest < most:
                middle = (fewest + most + 1) // 2
                fewest, most = (middle, most) if left(self._units(at(middle))) <= limit else (fewest, middle - 1)
            found = at(fewest)
            if left(self._units(found)) >= least:
                break
        return found

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
