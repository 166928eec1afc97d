"""Curves of losses under a budget: units go by what is lost with them for what they save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fxprune.channels.groups import ChannelGroup, Grouping, Scores
from fxprune.channels.ids import Mask, Vector
from fxprune.channels.totals import Total
from fxprune.prune.sensitivity.curve import Losses

ROUNDS = 4


@dataclass(frozen=True, eq=False)
class GroupCurves:
    """The curves of groups that are pruned.

    Attributes:
        groups: the groups. slopes: by unit of each, what is lost with it. losses: of each, without 0, 1, ... units.
    """

    groups: Sequence[ChannelGroup]
    slopes: Sequence[Losses]
    losses: Sequence[Losses]

    def scores(self, prices: Sequence[float]) -> list[Scores]:
        """By group, what is lost with each unit for what it saves; these are to be equal where a budget is met."""
        return [slopes / max(price, 1e-30) for slopes, price in zip(self.slopes, prices, strict=True)]

    def loss(self, alive: Mask) -> float:
        """The sum of the losses of what is gone."""
        return sum(
            float(losses[int((~alive[group.units]).sum())])
            for group, losses in zip(self.groups, self.losses, strict=True)
        )


def prices(grouping: Grouping, groups: Sequence[ChannelGroup], budget: str, alive: Mask | None = None) -> list[float]:
    """What one more unit of each group saves of a budget: of the dense module, or of what a choice has left.

    MACs are products of what writes channels and what reads them: what a unit saves falls with its neighbours.
    """
    if budget == "amount":
        return [1.0] * len(groups)
    if alive is None:
        alive = np.ones(grouping.found.classes.count, bool)
    total = grouping.parameters if budget == "parameters" else grouping.macs
    return [_price(grouping, group, total, alive) for group in groups]


def _price(grouping: Grouping, group: ChannelGroup, total: Total, alive: Mask) -> float:
    left: Vector = group.units[alive[group.units]]
    if not len(left):
        return 1.0
    dead = grouping.units.dead(left[:1])
    return float(total(alive) - total(alive & ~dead))


def cheapest(
    curves: GroupCurves,
    priced: Callable[[Mask | None], list[float]],
    choose: Callable[[list[Scores]], Mask | None],
) -> list[Scores]:
    """The scores whose choice loses least: by the prices of the dense module, then of what the last choice left.

    Args:
        curves: of the groups. priced: what a unit saves, given what is left.
        choose: from scores to what is left; None where no choice keeps the budget.
    """
    best = scores = curves.scores(priced(None))
    least = float("inf")
    for _ in range(ROUNDS):
        alive = choose(scores)
        if alive is None or curves.loss(alive) >= least:
            break
        best, least = scores, curves.loss(alive)
        scores = curves.scores(priced(alive))
    return best
