"""Which units of the channel groups go: scores of the groups, cut to a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fxprune.channels.groups import ChannelGroup, Grouping
from fxprune.channels.ids import Vector
from fxprune.errors import ArgumentError, PruningError

Scores = NDArray[np.float64]


def slice_scores(
    grouping: Grouping, reduce: Callable[[torch.Tensor, int], torch.Tensor], of: Callable[[str, str], torch.Tensor | None]
) -> list[Scores]:
    """For each group, the mean over the members' slices of a score of each slice.

    Args:
        grouping: the groups.
        reduce: from a tensor and an axis to one score for each index of the axis.
        of: from a parameter's name and role to the tensor that is scored, None to leave the member out.
    """
    count = grouping.found.classes.count
    total, slices = np.zeros(count), np.zeros(count)
    for name, axis, vector in grouping.axes:
        tensor = of(name, "reader" if (name, axis) in grouping.readers else "writer")
        if tensor is not None:
            value = reduce(tensor.detach(), axis).double().cpu().numpy()
            np.add.at(total, vector, value)
            np.add.at(slices, vector, 1.0)
    unit, position = grouping.positions
    for sums in (total, slices):
        np.add.at(sums, unit, sums[position])
    mean = np.divide(total, slices, out=np.zeros(count), where=slices > 0)
    return [mean[group.units] for group in grouping.groups]


class Ladder:
    """The order in which a group loses its units: step i removes the i-th lowest unit of each of its bundles."""

    def __init__(self, group: ChannelGroup, scores: Scores, multiple: int, most: float, least: int) -> None:
        where = {int(u): i for i, u in enumerate(group.units)}
        table = scores[np.vectorize(where.__getitem__, otypes=[np.int64])(group.bundles)]
        order = np.argsort(table, axis=1, kind="stable")
        self.units: Vector = np.take_along_axis(group.bundles, order, 1)
        self.scores: Scores = np.take_along_axis(table, order, 1).mean(0)
        self.group, self.width = group, len(group.bundles)
        self.steps = self.units.shape[1]
        self._multiple = multiple // math.gcd(multiple, self.width)
        self._most = min(int(most * self.steps), self.steps - min(least, self.steps))

    def removed(self, wanted: int) -> int:
        """The number of steps to take when `wanted` are asked for: limits, and the nearest multiple of what stays."""
        wanted = min(wanted, self._most)
        left = self.steps - wanted
        nearest = self._multiple * max(1, math.floor(left / self._multiple + 0.5))
        if wanted == 0 or nearest >= self.steps:
            return 0
        while self.steps - nearest > self._most:
            nearest += self._multiple
        return max(0, self.steps - nearest)


def ladders(
    groups: Sequence[ChannelGroup], scores: Sequence[Scores], round_to: int | str, most: float, least: int
) -> list[Ladder]:
    """The ladders of the groups that may be pruned; checks scores and rounding."""
    found = []
    for group, score in zip(groups, scores, strict=True):
        if not np.isfinite(score).all():
            raise PruningError(f"the importance of {group.name!r} ({group.kind}) is NaN or inf; no mask was inserted.")
        if isinstance(round_to, int) and round_to > group.size:
            raise ArgumentError(
                f"round_to={round_to} is more than the {group.size} units of {group.name!r} ({group.kind}). "
                'Choose a smaller one, "auto", or put it into `ignore`.'
            )
        found.append(Ladder(group, score, _multiple(group, round_to), most, least))
    return found


def _multiple(group: ChannelGroup, round_to: int | str) -> int:
    # onnxruntime computes a convolution's channels in blocks of 16, and counts that are no multiple of 4 slower still
    if isinstance(round_to, int):
        return round_to
    if not group.aligned or group.kind == "attention head":
        return 1
    return 16 if group.size >= 32 else 4 if group.size >= 8 else 1


def choose(
    found: Sequence[Ladder], scope: str, fits: Callable[[Vector], bool] | None, amount: float, what: str
) -> Vector:
    """The units to mask: a share of all, or the fewest that fit a budget.

    Args:
        found: the ladders.
        scope: "global" cuts at one level of the normalized scores, "local" takes the same share of each group.
        fits: whether what is left without these units is within the budget; None takes `amount`.
        amount: share of the units, or their number.
        what: the budget in words, for the message when it cannot be reached.
    """
    pooled = np.sort(np.concatenate([ladder.scores for ladder in found]))
    weights = np.concatenate([np.full(ladder.steps, ladder.width) for ladder in found])
    weights = weights[np.argsort(np.concatenate([ladder.scores for ladder in found]), kind="stable")]
    total = int(weights.sum())

    def take(share: float) -> Vector:
        parts = []
        level = -np.inf
        if scope == "global" and share > 0:
            index = int(np.searchsorted(np.cumsum(weights), round(share * total)))
            level = pooled[min(index, len(pooled) - 1)]
        for ladder in found:
            wanted = round(share * ladder.steps)
            if scope == "global":
                wanted = int(np.searchsorted(ladder.scores, level, "right")) if share < 1 else ladder.steps
            parts.append(ladder.units[:, : ladder.removed(wanted)].reshape(-1))
        return np.concatenate(parts)

    if fits is None:
        return take(amount if isinstance(amount, float) else min(1.0, amount / total))
    if not fits(take(1.0)):
        raise PruningError(f"{what} cannot be reached by the groups that may be pruned.")
    low, high = 0, 4096
    if fits(take(0.0)):
        return take(0.0)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(take(middle / 4096)) else (middle, high)
    return take(high / 4096)


def masks(grouping: Grouping, units: Vector) -> Mapping[str, torch.Tensor]:
    """For each parameter that the units cut as a writer, its mask."""
    dead = ~grouping.alive(units)
    found: dict[str, torch.Tensor] = {}
    for name, axis, vector in grouping.axes:
        gone = dead[vector]
        if gone.any() and (name, axis) not in grouping.readers:
            parameter = grouping.plain.get_parameter(name)
            mask = found.setdefault(name, torch.ones(parameter.shape))
            mask.index_fill_(axis, torch.from_numpy(np.flatnonzero(gone)), 0.0)
    return found
