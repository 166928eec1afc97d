"""Which units of the channel groups go: scores of the groups, cut to a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fxprune.channels.alignment import BLOCK, FINEST, fast_multiple
from fxprune.channels.groups import WHOLE_KINDS, ChannelGroup, Grouping, Scores, steps_of
from fxprune.channels.ids import Mask, Vector
from fxprune.channels.parameter_axes import ChannelAxis
from fxprune.errors import ArgumentError, PruningError
from fxprune.graph.masks import MasksOnDemand

# what moving an element takes, in MACs: fitted to the layers of a MobileNetV2 in onnxruntime (one thread, AVX2)
MOVED = 11.0
# what the layers of channels cost outside the layout of blocks, as a share of their MACs: measured with 19 to 61 of 64
UNBLOCKED = 1.4


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
    Where a step of a block has parts, each is a step here; rounded, as many are taken as make whole ones of the block.

    Args:
        groups: the groups.
        scores: for each a score of its units.
        roundings: how many stay, coarse ones first: each goes on where the one before ends.
        lean: as in `Rounding.steps_taken`, for the first of them where it rounds at all.
        gone: for each group which of its units are masked; these go first.
        started: whether what is gone was chosen by an earlier budget: what is left of its multiple follows at once, so
            that groups are cut one after the other, not all of them a little.
        within: the classes that may go; None: all of them.

    Attributes:
        units: [steps, width], the units that go with each step, filled up with -1.
        scores: the mean score of each step.
        taken: for each rounding how many steps are taken when 1, 2, ... are asked for.
        gone: how many steps are masked, whatever is chosen.
        first: how many steps go before those of all other ladders.
        most: how many steps can be taken.
        is_blocked: whether onnxruntime computes these channels in blocks, as long as their number allows it.
    """

    def __init__(
        self,
        groups: Sequence[ChannelGroup],
        scores: Sequence[Scores],
        roundings: Sequence[Rounding],
        lean: float = 0.0,
        gone: Sequence[Mask] = (),
        started: bool = False,
        within: Mask | None = None,
    ) -> None:
        self._groups = groups
        dead = gone or [np.zeros(len(score), bool) for score in scores]
        ranks = [score - masked * (np.ptp(score) + 1) for score, masked in zip(scores, dead, strict=True)]
        self.units = steps_of(groups, ranks)
        self.steps, self.width = self.units.shape
        self._parts = max(group.parts.shape[1] for group in groups)
        self._left = self._left_of(groups)
        # what is gone goes first, whatever its values are now
        each, counts = self._by_step(groups, scores, 0.0), (self.units >= 0).sum(1)
        self.scores: Scores = np.minimum.accumulate((each.sum(1) / counts)[::-1])[::-1]
        self.gone = int(self._by_step(groups, dead, 1.0).all(1).sum())
        self.is_blocked = any(group.blocked for group in groups)
        self.taken: list[Vector] = []
        leans = roundings[0].multiple_of_steps(groups) > 1
        for rounding in roundings:
            own = self._steps_taken(rounding, lean if leans and not self.taken else 0.0)
            self.taken.append(np.maximum(own, self.taken[-1].max()) if self.taken else own)
        if within is not None:
            most = max(self.gone, self.level_of(~within))
            self.taken = [np.minimum(own, most) for own in self.taken]
        ends = self.taken[0][self.taken[0] >= self.gone]
        self.first = int(ends.min()) if started and self.gone and self.is_blocked and len(ends) else 0
        self.taken[0][: self.first] = self.first
        self.most = int(self.taken[-1].max())

    def units_at(self, level: int) -> Vector:
        """The units that go when so many steps are taken."""
        taken = self.units[:level].reshape(-1)
        return taken if self._parts == 1 else taken[taken >= 0]

    def level_of(self, alive: Mask) -> int:
        """How many steps, from the first on, are taken where these classes are left."""
        taken = ~(alive[self.units] & (self.units >= 0)).any(1)
        return int(np.logical_and.accumulate(taken).sum())

    def _left_of(self, groups: Sequence[ChannelGroup]) -> Vector:
        """[steps + 1, groups], the units of each group that are left."""
        sizes = np.array([group.size for group in groups])
        group_of = np.zeros(int(max(group.units.max() for group in groups)) + 1, np.int64)
        for number, group in enumerate(groups):
            group_of[group.units] = number
        taken = np.where(self.units[..., None] >= 0, group_of[self.units][..., None] == np.arange(len(groups)), False)
        return np.concatenate([sizes[None], sizes - np.cumsum(taken.sum(1), axis=0)])

    def _steps_taken(self, rounding: Rounding, lean: float) -> Vector:
        """How many steps are taken when 1, 2, ... are asked for."""
        if self._parts == 1:
            return rounding.steps_taken(self._groups, self.steps, lean)
        if rounding.to == 1:
            sizes = self._left[0]
            enough = (self._left >= np.maximum(rounding.least, sizes * (1 - rounding.most) - 1e-9)).all(1)
            return np.arange(1, self.steps + 1).clip(max=int(np.flatnonzero(enough).max(initial=0)))
        whole = rounding.steps_taken(self._groups, self.steps // self._parts, lean)
        return np.repeat(whole * self._parts, self._parts)

    def _by_step(
        self, groups: Sequence[ChannelGroup], values: Sequence[Vector | Scores | Mask], beside: float
    ) -> Scores:
        """Values of the units of groups, [steps, width], with another one where there is no unit."""
        found = np.zeros(int(max(group.units.max() for group in groups)) + 1)
        for group, own in zip(groups, values, strict=True):
            found[group.units] = own
        return np.where(self.units >= 0, found[self.units], beside)

    def is_unblocked(self, level: int) -> bool:
        """Whether onnxruntime leaves the layout of blocks for some of the channels when so many steps are taken."""
        return any(_is_unblocked(group, count) for group, count in self._counts(level))

    def waste(self, level: int) -> float:
        """What runs for nothing when so many steps are taken, in MACs: channels that fill a block, and slow layouts."""
        wasted = 0.0
        for group, count in self._counts(level):
            if group.aligned:
                wasted += group.macs * (-count % BLOCK)
            if _is_unblocked(group, count):
                wasted += UNBLOCKED * group.macs * count
        return wasted

    def _counts(self, level: int) -> Iterator[tuple[ChannelGroup, int]]:
        """The groups of channels, and how many of them are left when so many steps are taken."""
        counts = self._left[max(level, self.gone)].tolist()
        for group, count in zip(self._groups, counts, strict=True):
            if group.kind not in WHOLE_KINDS:
                yield group, count


def _is_unblocked(group: ChannelGroup, count: int) -> bool:
    return group.blocked and count > BLOCK and count % FINEST > 0


def ladders(
    groups: Sequence[ChannelGroup], scores: Sequence[Scores], round_to: int | Sequence[int | str], most: float,
    least: int, timed: bool = False, gone: Sequence[Mask] = (), started: Sequence[bool] = (),
    within: Mask | None = None,
) -> list[Ladder]:  # fmt: skip
    """The ladders of the groups, one for those that must be cut together; checks scores and rounding.

    Args:
        groups: the groups to cut.
        scores: for each a score of its units.
        round_to: a multiple; or roundings as in `Rounding`, each to go on with where the one before ends.
        most, least: as in `Rounding`.
        timed: under the first rounding, if it is "auto", a group whose MACs take more time than the average ends a
            multiple below the nearest, one whose take less a multiple above it: the same MACs in less time.
        gone, started: for each group, as in `Ladder`. within: as there.

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
        own_scores, own_gone = [scores[i] for i in index], [gone[i] for i in index if gone]
        is_started = any(started[i] for i in index if started)
        found.append(Ladder(own, own_scores, roundings, lean, own_gone, is_started, within))
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


def masks(grouping: Grouping, alive: Mask) -> MasksOnDemand:
    """For each parameter that holds a dead class its mask, boolean: the entries of the axes that decide, expanded."""
    dead = [bool((~alive[vector]).any()) for vector in grouping.axes.vectors]
    axes: dict[str, list[ChannelAxis]] = {}
    for axis in grouping.axes:
        if dead[axis.vector]:
            axes.setdefault(axis.parameter, []).append(axis)

    def made(name: str) -> torch.Tensor:
        shape, own = grouping.plain.get_parameter(name).shape, {axis.axis for axis in axes[name]}
        if 1 in own and name in grouping.axes.grouped:
            own.add(0)  # each group has columns of its own
        mask = torch.ones([size if d in own else 1 for d, size in enumerate(shape)], dtype=torch.bool)
        for axis in axes[name]:
            grouping.axes.clear(axis, mask, alive)
        return mask.expand(shape)

    return MasksOnDemand(axes, made)
