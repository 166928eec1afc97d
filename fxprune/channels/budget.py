"""Which units of the channel groups go: scores of the groups, cut to a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from fxprune.channels.alignment import fast_multiple
from fxprune.channels.groups import ChannelGroup, Grouping, Scores, steps_of
from fxprune.channels.ids import Mask, Vector
from fxprune.errors import ArgumentError, PruningError

# what moving an element takes, in MACs: fitted to the layers of a MobileNetV2 in onnxruntime (one thread, AVX2)
MOVED = 11.0
# a multiple is asked of the channels within these, not of their number
_WHOLE = ("attention head", "key-value group", "conv group")


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


class Ladder:
    """The order in which groups that are cut together lose their units: a row of `units` is one step.

    What stays is rounded to the nearest multiple and `lean` multiples more.
    """

    def __init__(
        self, groups: Sequence[ChannelGroup], scores: Sequence[Scores], round_to: int | str, most: float, least: int,
        lean: float,
    ) -> None:  # fmt: skip
        self.units = steps_of(groups, scores)
        self.steps, self.width = self.units.shape
        every = np.concatenate([g.units for g in groups])
        value = np.zeros(int(every.max()) + 1)
        value[every] = np.concatenate(scores)
        self.scores: Scores = value[self.units].mean(1)
        stays = max(1, math.ceil(least * self.steps / min(g.size for g in groups)))
        most = max(0, min(math.floor(most * self.steps + 1e-9), self.steps - stays))
        multiple = min(m // math.gcd(m, max(1, int(g.share[0]))) for g in groups for m in [_multiple(g, round_to)])
        wanted = np.minimum(np.arange(1, self.steps + 1), most)
        left = multiple * np.maximum(1, np.floor((self.steps - wanted) / multiple + 0.5 + lean)).astype(np.int64)
        left = np.where(self.steps - left > most, -(-(self.steps - most) // multiple) * multiple, left)
        # how many steps are taken when 1, 2, ... are asked for
        self.taken: Vector = np.where(left >= self.steps, 0, self.steps - left)


def ladders(
    groups: Sequence[ChannelGroup], scores: Sequence[Scores], round_to: int | str, most: float, least: int,
    timed: bool = False,
) -> list[Ladder]:  # fmt: skip
    """The ladders of the groups, one for those that must be cut together; checks scores and rounding.

    Where MACs are `timed`, a group whose MACs take more time than the average ends a multiple below the nearest, one
    whose take less a multiple above it: the same MACs in less time.
    """
    together: dict[int, list[int]] = {}
    for i, (group, score) in enumerate(zip(groups, scores, strict=True)):
        if not np.isfinite(score).all():
            raise PruningError(f"the importance of {group.name!r} ({group.kind}) is NaN or inf; no mask was inserted.")
        if isinstance(round_to, int) and round_to > group.size and group.kind not in _WHOLE:
            raise ArgumentError(
                f"round_to={round_to} is more than the {group.size} units of {group.name!r} ({group.kind}). "
                'Choose a smaller one, "auto", or put it into `ignore`.'
            )
        together.setdefault(group.block if group.block >= 0 else -1 - i, []).append(i)

    def slowness(own: Sequence[ChannelGroup]) -> float:
        macs = sum(g.macs * g.size for g in own)
        return (macs + MOVED * sum(g.traffic * g.size for g in own)) / max(macs, 1)

    def lean(own: Sequence[ChannelGroup], average: float = slowness(groups)) -> float:
        return math.copysign(1, average - slowness(own)) if timed and isinstance(round_to, str) else 0.0

    return [
        Ladder(own, [scores[i] for i in index], round_to, most, least, lean(own))
        for index in together.values()
        for own in [[groups[i] for i in index]]
    ]


def _multiple(group: ChannelGroup, round_to: int | str) -> int:
    if group.kind in _WHOLE:
        return 1
    if isinstance(round_to, int):
        return round_to
    return fast_multiple(group.size, fine=round_to == "fine") if group.aligned else 1


class Staircase:
    """All steps of the ladders in one order, each a choice of units that holds the one before.

    Scope "global" orders by score, "local" takes the same share of every ladder at a time; scores that tie are taken
    like local ones.
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
        self._which, self._taken, self._score = (values[order][self._rank] for values in (which, taken, level))

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
        return self._units(self._level(stairs))

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

        The last stair, or the best next one of another ladder whose score is at most half as much more, without what
        need not be taken then.
        """
        if not stairs:
            return self.units(0)
        next_of = np.unique(self._which[stairs - 1 :], return_index=True)[1] + stairs - 1
        next_of = next_of[self._score[next_of] <= max(worth := self._score[stairs - 1], 1.5 * worth)]
        others = [self._level(stairs - 1) for _ in next_of]
        for level, stair in zip(others, next_of, strict=True):
            level[self._which[stair]] = self._taken[stair]
        fitting = [(n, i) for i, level in enumerate(others) if (n := left(self._units(level))) <= limit]
        last = {ladder: stair for stair, ladder in enumerate(self._which[: stairs - 1].tolist())}
        found = []
        for level in (self._level(stairs), others[max(fitting)[1]]):
            for ladder, stair in sorted(last.items(), key=lambda item: -item[1]):
                fewer = level.copy()
                fewer[ladder] = self._level(stair)[ladder]
                if left(self._units(fewer)) <= limit:
                    level = fewer
            found.append(self._units(level))
        return max(found, key=left)

    def _level(self, stairs: int) -> Vector:
        """How many steps of each ladder the first stairs are."""
        taken = np.zeros(len(self._ladders), np.int64)
        np.maximum.at(taken, self._which[:stairs], self._taken[:stairs])
        return taken

    def _units(self, level: Vector) -> Vector:
        return np.concatenate([x.units[:n].reshape(-1) for x, n in zip(self._ladders, level, strict=True)])


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
