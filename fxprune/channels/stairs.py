"""Which steps of the ladders go, in which order, and where a limit on what is left is met best."""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fxprune.channels.alignment import BLOCK, FINEST
from fxprune.channels.budget import Ladder
from fxprune.channels.groups import Scores
from fxprune.channels.ids import Mask, Vector

# the score that the last stair may have at most, relative to the stair whose place it takes
ALIKE = 1.5
# the multiples in which units are given back where whole stairs do not use a limit up
FINER = (8, 4, 1)
# how many ladders are tried for that, how many are cut finer at most, and how many ways to do that are followed
TRIED = 8
CUT_FINER = 3
KEPT = 2
# how often steps of one ladder are exchanged for smaller ones of another where nothing else uses a limit up
EXCHANGED = 8


@dataclass(frozen=True)
class Limit:
    """What a choice of units may leave.

    Attributes:
        left: from a choice of units to what it leaves.
        most: what may be left.
        spent: the share of it that uses it up.
    """

    left: Callable[[Vector], float]
    most: float
    spent: float


class Steps(abc.ABC):
    """Choices of units, each of which holds the one before."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many there are beside that of no units."""

    @abc.abstractmethod
    def units(self, stairs: int) -> Vector:
        """The units that go with the first stairs."""

    @abc.abstractmethod
    def land(self, limit: Limit) -> Vector | None:
        """The units of a choice that keeps a limit and uses it up as well as can be, None where all leave more."""

    def search(self, fits: Callable[[Vector], bool]) -> int | None:
        """The fewest stairs that fit, None where all of them do not."""
        low, high = -1, len(self)
        if not fits(self.units(high)):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(self.units(middle)) else (middle, high)
        return high


class Staircase(Steps):
    """All steps of the ladders in one order, each stair a choice of units that holds the one before.

    Scope "global" orders by score, "local" takes the same share of every ladder at a time; scores that tie are taken
    like local ones. Only steps that take something, once rounded, are stairs: two ladders of 8 units, rounded to 4,
    make two stairs, one of each ladder. Stairs of a finer rounding follow all those of the coarser one.

    Attributes:
        ladders: what it was made of.
        ladder_of, taken, scores: by stair its ladder, how many steps of that are taken then, and its score.

    Example:
        >>> stairs = Staircase(ladders(groups, scores, round_to=4, most=1.0, least=1), "global")
        >>> len(stairs), stairs.units(1)
        (2, array([0, 1, 2, 3]))
    """

    def __init__(self, found: Sequence[Ladder], scope: str) -> None:
        which = np.repeat(np.arange(len(found)), [ladder.steps for ladder in found])
        share = np.concatenate([(np.arange(ladder.steps) + 0.5) / ladder.steps for ladder in found])
        level = np.concatenate([ladder.scores for ladder in found]) if scope == "global" else share
        first = np.concatenate([np.arange(ladder.steps) < ladder.first for ladder in found])
        order = np.lexsort((share, level, ~first))
        parts = []
        for phase in range(len(found[0].taken)):
            start = [0 if phase == 0 else int(ladder.taken[phase - 1].max()) for ladder in found]
            before = np.concatenate([[s, *x.taken[phase][:-1]] for s, x in zip(start, found, strict=True)])
            taken = np.concatenate([ladder.taken[phase] for ladder in found])
            rank = order[taken[order] > before[order]]
            parts.append(np.stack([which[rank], taken[rank], level[rank]]))
        ladder_of, taken_of, scores = np.concatenate(parts, axis=1)
        self.ladders = found
        self.ladder_of: Vector = ladder_of.astype(np.int64)
        self.taken: Vector = taken_of.astype(np.int64)
        self.scores: Scores = scores

    def __len__(self) -> int:
        return len(self.ladder_of)

    def units(self, stairs: int) -> Vector:
        """The units that go with the first stairs."""
        return self.units_at(self.levels(stairs))

    def levels(self, stairs: int) -> Vector:
        """How many steps of each ladder the first stairs are."""
        taken = np.zeros(len(self.ladders), np.int64)
        np.maximum.at(taken, self.ladder_of[:stairs], self.taken[:stairs])
        return taken

    def units_at(self, levels: Vector) -> Vector:
        """The units that go with so many steps of each ladder."""
        return np.concatenate([x.units_at(int(n)) for x, n in zip(self.ladders, levels, strict=True)])

    def waste(self, alive: Mask) -> float:
        """What runs for nothing where these classes are left, in MACs."""
        return sum(ladder.waste(ladder.level_of(alive)) for ladder in self.ladders)

    def latest(self, stairs: int) -> list[int]:
        """The ladders of the first stairs, by their last one, the latest first."""
        last = dict(zip(self.ladder_of[:stairs].tolist(), range(stairs), strict=True))
        return sorted(last, key=lambda ladder: -last[ladder])

    def below(self, ladder: int, level: int) -> int:
        """How many steps of a ladder were taken one stair before a level, of those that may be given back."""
        taken = self.taken[self.ladder_of == ladder]
        earlier = taken[taken < level]
        return min(level, max(self.ladders[ladder].gone, int(earlier.max()) if len(earlier) else 0))

    def land(self, limit: Limit) -> Vector | None:
        """The units of the fewest stairs that keep a limit, without those that need not go for that.

        1. Whole stairs: the last one, or in its place that of another ladder whose score is alike; without earlier
           ones that need not be taken then.
        2. Where these do not use the limit up, units of one to three ladders are given back, in multiples of 8, of 4,
           or one by one, in the way that costs the least latency (`Ladder.waste`).
        3. Where that does not either, those of more ladders, and steps of one for smaller ones of another.

        Returns:
            The units, None where all stairs leave more than the limit.
        """
        height = self.search(lambda units: limit.left(units) <= limit.most)
        if height is None:
            return None
        return self.units_at(_Landing(self, limit, height).best()) if height else self.units(0)


class _Landing:
    """Choices near the first stairs that keep a limit, as levels: how many steps of each ladder are taken."""

    def __init__(self, stairs: Staircase, limit: Limit, height: int) -> None:
        self._stairs, self._limit, self._height = stairs, limit, height
        self._latest = stairs.latest(height)
        self._left: dict[bytes, float] = {}

    def best(self) -> Vector:
        whole = []
        for levels in self._whole():
            if self._lands(levels):
                return levels
            spared = self._spared(levels)
            if self._lands(spared):
                return spared
            whole.append(spared)
        return self._filled(whole)

    def _whole(self) -> Iterator[Vector]:
        """The first stairs, and all but the last with the next stair of another ladder instead."""
        stairs, last = self._stairs, self._height - 1
        yield stairs.levels(self._height)
        following = np.unique(stairs.ladder_of[last:], return_index=True)[1] + last  # the next stair of every ladder
        highest = max(stairs.scores[last], ALIKE * stairs.scores[last])
        others = []
        for stair in following[stairs.scores[following] <= highest].tolist():
            levels = stairs.levels(last)
            levels[stairs.ladder_of[stair]] = stairs.taken[stair]
            if stair != last and self._holds(levels):
                others.append(levels)
        if others:
            yield max(others, key=self._remaining)

    def _spared(self, levels: Vector) -> Vector:
        """Without the last stairs of ladders, the latest first, that need not be taken."""
        for ladder in self._latest:
            fewer = _with(levels, ladder, self._stairs.below(ladder, int(levels[ladder])))
            if self._unblocked(fewer) <= self._unblocked(levels) and self._holds(fewer):
                levels = fewer
        return levels

    def _filled(self, whole: Sequence[Vector]) -> Vector:
        """What wastes least of that which uses the limit up, else what leaves the most within it.

        Ladders are cut finer one after the other, until the limit is used up without leaving the blocked layout.
        """
        front, found = list(whole), list(whole)
        for _ in range(CUT_FINER):
            options = [option for levels in front for option in self._given_back(levels, whole)]
            found += options
            if any(self._spends(levels) and not self._unblocked(levels) for levels in options):
                break
            front = sorted(options, key=lambda levels: (self._unblocked(levels), -self._remaining(levels)))[:KEPT]
        nearest = max(found, key=self._remaining)
        if not self._spends(nearest):
            nearest = self._refilled(nearest)
            found.append(nearest)
        spent = [levels for levels in found if self._spends(levels)]
        is_wanting = all(map(self._leaves_layout, spent)) if spent else self._has_room(nearest)
        if is_wanting:
            spent += [option for levels in whole for option in self._in_blocks(levels) if self._spends(option)]
            if spent and all(map(self._leaves_layout, spent)):
                others = (option for levels in whole for option in self._rearranged(levels))
                spent += itertools.islice(filter(self._spends, others), 1)
        return min(spent, key=self._waste) if spent else self._exchanged(nearest)

    def _exchanged(self, levels: Vector) -> Vector:
        """Levels where steps of one ladder, of which one is too much, are exchanged for smaller ones of another.

        One step at a time; where that ends, and one step more would not be too much, several.
        """
        steps = 1
        for _ in range(EXCHANGED):
            options = list(self._exchanges(levels, steps))
            if steps > 1:
                options = [self._refilled(option) for option in options]
            best = max([levels, *options], key=self._remaining)
            is_better = self._remaining(best) > self._remaining(levels)
            levels = best
            if self._spends(levels) or not (is_better or self._has_room(levels)):
                return levels
            steps = 1 if is_better else steps + 1
        return levels

    def _has_room(self, levels: Vector) -> bool:
        """Whether as much as the smallest step of a ladder could stay within the limit."""
        unused = self._limit.most - self._remaining(levels)
        return any(self._step(levels, ladder) <= unused for ladder in range(len(levels)))

    def _step(self, levels: Vector, ladder: int) -> float:
        """How much is left more by a step of a ladder: the last that is taken, or the first where none is."""
        own, level = self._stairs.ladders[ladder], int(levels[ladder])
        beside = level - 1 if level > own.gone else level + 1
        if beside > own.most:
            return math.inf
        return abs(self._remaining(_with(levels, ladder, beside)) - self._remaining(levels))

    def _exchanges(self, levels: Vector, steps: int) -> Iterator[Vector]:
        """With steps of a ladder given back, and the fewest of another one taken that the limit then asks for."""
        ladders = self._stairs.ladders
        for ladder in self._taken(levels)[:TRIED]:
            if levels[ladder] - steps < ladders[ladder].gone:
                continue
            given = _with(levels, ladder, int(levels[ladder]) - steps)
            for other in range(len(ladders)):
                if other != ladder and levels[other] < ladders[other].most:
                    yield from self._cut(given, other, range(int(levels[other]) + 1, ladders[other].most + 1))

    def _refilled(self, levels: Vector, smooth: bool = False) -> Vector:
        """With steps that need not be taken given back, the latest ladder first, until the limit is used up.

        Smooth: of ladders alone that are not computed in blocks.
        """
        for each in (FINEST, 1):
            for ladder in self._taken(levels):
                if self._spends(levels):
                    return levels
                if smooth and self._stairs.ladders[ladder].is_blocked:
                    continue
                level = int(levels[ladder])
                room = max(0, level - self._stairs.ladders[ladder].gone)
                levels = _with(levels, ladder, level - self._most(levels, ladder, each, room))
        return levels

    def _taken(self, levels: Vector) -> list[int]:
        """The ladders that steps are taken of, the latest first: before those of the first stairs what stands in."""
        instead = [i for i, ladder in enumerate(self._stairs.ladders) if levels[i] > ladder.gone]
        return [*(i for i in instead if i not in self._latest), *self._latest]

    def _given_back(self, levels: Vector, whole: Sequence[Vector]) -> Iterator[Vector]:
        """With as much of the last stair of one more ladder given back as the limit allows, by each multiple.

        Also with more than that, where a ladder that costs no latency is cut instead.
        """
        ladders = self._stairs.ladders
        uncut = [ladder for ladder in self._taken(levels) if any(levels[ladder] == own[ladder] for own in whole)]
        smooth = [ladder for ladder in uncut if not ladders[ladder].is_blocked]
        for ladder in dict.fromkeys([*uncut[:TRIED], *smooth[:TRIED]]):
            level = int(levels[ladder])
            below = self._stairs.below(ladder, level)
            given = {each: self._most(levels, ladder, each, level - below) for each in FINER if each <= level - below}
            for steps in set(given.values()) - {0}:
                yield _with(levels, ladder, level - steps)
            if ladders[ladder].is_blocked:
                more = {steps + each for each, steps in given.items() if each > 1 and steps + each <= level - below}
                for steps in more:
                    yield from self._cut_instead(_with(levels, ladder, level - steps))

    def _cut_instead(self, levels: Vector) -> Iterator[Vector]:
        """Levels that leave too much, with the fewest more steps of a ladder that costs no latency that mend that."""
        ladders = self._stairs.ladders
        most_of = [min(ladder.most, ladder.steps - BLOCK) for ladder in ladders]  # a block stays, for accuracy's sake
        smooth = [i for i, ladder in enumerate(ladders) if not ladder.is_blocked and levels[i] < most_of[i]]
        smooth.sort(key=lambda i: float(ladders[i].scores[levels[i]]))
        for ladder in smooth[:KEPT]:
            level = int(levels[ladder])
            yield from self._cut(levels, ladder, range(level + 1, min(most_of[ladder], level + BLOCK) + 1))

    def _in_blocks(self, levels: Vector) -> Iterator[Vector]:
        """With too many steps of a ladder given back, and the fewest of another one taken that mend that.

        Both stay in the blocked layout, in which fewer channels than a block may be any number.
        """
        for ladder in self._taken(levels)[:TRIED]:
            level = int(levels[ladder])
            below = self._stairs.below(ladder, level)
            for fewer in range(max(below, level - BLOCK), level):
                given = _with(levels, ladder, fewer)
                if not self._stairs.ladders[ladder].is_unblocked(fewer) and not self._holds(given):
                    yield from self._mended_in_blocks(given, ladder)

    def _rearranged(self, levels: Vector) -> Iterator[Vector]:
        """In blocks, with fewer steps of one ladder, more of another, and smooth ones to fit.

        The ladders whose number of channels may be any take or give back what is between two multiples of the others.
        """
        ladders = self._stairs.ladders
        blocked = [i for i, own in enumerate(ladders) if own.is_blocked]
        for ladder in [i for i in self._taken(levels) if i in blocked][:TRIED]:
            room = range(int(levels[ladder]) - 1, ladders[ladder].gone - 1, -1)
            for fewer in [n for n in room if not ladders[ladder].is_unblocked(n)][:BLOCK]:
                given = _with(levels, ladder, fewer)
                for other in [i for i in blocked if i != ladder and not self._holds(given)][:TRIED]:
                    yield from self._between(given, other)

    def _between(self, levels: Vector, ladder: int) -> Iterator[Vector]:
        """With the fewest blocked steps of a ladder that keep the limit, or one fewer, and smooth ladders to fit."""
        own, level = self._stairs.ladders[ladder], int(levels[ladder])
        choices = [n for n in range(level, (level + own.steps) // 2 + 1) if n <= own.most and not own.is_unblocked(n)]
        for enough in self._cut(levels, ladder, choices):
            if not self._unblocked(enough):
                yield self._refilled(enough, smooth=True)
                beside = choices.index(int(enough[ladder])) - 1
                if beside >= 0:
                    yield from self._cut_instead(_with(enough, ladder, choices[beside]))

    def _mended_in_blocks(self, levels: Vector, spared: int) -> Iterator[Vector]:
        """With more steps of one ladder but a spared one, at most half of what is left of it."""
        ladders = self._stairs.ladders
        most_of = [min(x.most, int(n) + BLOCK, int(n + x.steps) // 2) for x, n in zip(ladders, levels, strict=True)]
        free = [i for i, most in enumerate(most_of) if levels[i] < most and i != spared]
        for i in sorted(free, key=lambda i: float(ladders[i].scores[levels[i]]))[:TRIED]:
            steps = range(int(levels[i]) + 1, most_of[i] + 1)
            yield from self._cut(levels, i, [n for n in steps if not ladders[i].is_unblocked(n)])

    def _cut(self, levels: Vector, ladder: int, choices: Sequence[int]) -> Iterator[Vector]:
        """With the fewest steps of a ladder, out of ascending ones, that keep the limit, if any do."""
        low, high = -1, len(choices) - 1
        if high < 0 or not self._holds(_with(levels, ladder, choices[high])):
            return
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._holds(_with(levels, ladder, choices[middle])) else (middle, high)
        yield _with(levels, ladder, choices[high])

    def _most(self, levels: Vector, ladder: int, each: int, room: int) -> int:
        """How many steps of a ladder can be given back, of a number that may be, and in multiples."""
        level = int(levels[ladder])
        fewest, most = 0, room // each
        while fewest < most:
            middle = (fewest + most + 1) // 2
            fits = self._holds(_with(levels, ladder, level - each * middle))
            fewest, most = (middle, most) if fits else (fewest, middle - 1)
        return fewest * each

    def _remaining(self, levels: Vector) -> float:
        key = levels.tobytes()
        if key not in self._left:
            self._left[key] = self._limit.left(self._stairs.units_at(levels))
        return self._left[key]

    def _holds(self, levels: Vector) -> bool:
        return self._remaining(levels) <= self._limit.most

    def _spends(self, levels: Vector) -> bool:
        return self._remaining(levels) >= self._limit.spent * self._limit.most

    def _lands(self, levels: Vector) -> bool:
        """Whether nothing better is to be looked for."""
        return self._spends(levels) and not self._leaves_layout(levels)

    def _waste(self, levels: Vector) -> tuple[float, int]:
        """What runs for nothing, and how many ladders are cut finer."""
        ladders = self._stairs.ladders
        wasted = sum(ladder.waste(int(level)) for ladder, level in zip(ladders, levels, strict=True))
        finer = sum(int(n) not in ladder.taken[0] for ladder, n in zip(ladders, levels, strict=True) if n)
        return wasted, finer

    def _unblocked(self, levels: Vector) -> int:
        """How many ladders leave the blocked layout."""
        return sum(ladder.is_unblocked(int(n)) for ladder, n in zip(self._stairs.ladders, levels, strict=True))

    def _leaves_layout(self, levels: Vector) -> bool:
        """Whether a ladder leaves the blocked layout by what was chosen finer than it is to be rounded."""
        return any(
            n > ladder.gone and n not in ladder.taken[0] and ladder.is_unblocked(n)
            for ladder, n in zip(self._stairs.ladders, levels.tolist(), strict=True)
        )


def _with(levels: Vector, ladder: int, level: int) -> Vector:
    changed = levels.copy()
    changed[ladder] = level
    return changed
