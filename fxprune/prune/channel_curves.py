"""Curves of losses under a budget: units go by what is lost with them for what they save."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fxprune.channels.groups import ChannelGroup, Grouping, Scores
from fxprune.channels.ids import Mask, Vector
from fxprune.channels.totals import Total
from fxprune.prune.sensitivity.curve import Losses

ROUNDS = 4
MIXTURES = (0.5, 0.25, 0.75, 0.0, 1.0)  # of what parameters are worth, where MACs count too

# what a unit of a group saves, or what is saved without 0, 1, ... units
Price = float | Losses
# what one of "macs", of "parameters" and of "seconds" is worth; of nothing else, units alone count
Exchange = Mapping[str, float]


@dataclass(frozen=True, eq=False)
class GroupCurves:
    """The curves of groups that are pruned.

    Attributes:
        groups: the groups. slopes: by unit of each, what is lost with it. losses: of each, without 0, 1, ... units.
    """

    groups: Sequence[ChannelGroup]
    slopes: Sequence[Losses]
    losses: Sequence[Losses]

    def scores(self, prices: Sequence[Price]) -> list[Scores]:
        """By group, what is lost with each unit for what it saves; these are to be equal where a budget is met."""
        each = zip(self.slopes, self.losses, prices, strict=True)
        return [
            _slopes_for(slopes, losses, price) if isinstance(price, np.ndarray) else slopes / max(price, 1e-30)
            for slopes, losses, price in each
        ]

    def loss(self, alive: Mask) -> float:
        """The sum of the losses of what is gone."""
        return sum(
            float(losses[int((~alive[group.units]).sum())])
            for group, losses in zip(self.groups, self.losses, strict=True)
        )


def _slopes_for(slopes: Losses, losses: Losses, saved: Losses) -> Losses:
    """By unit, what is lost with it for what it saves, where units that go later may save more.

    Where many units save next to nothing, and the next ones much, they go together: the hull of losses over savings.
    """
    hull: list[int] = []
    for place in range(len(losses)):
        while len(hull) > 1 and _is_above(saved, losses, hull[-2], hull[-1], place):
            hull.pop()
        hull.append(place)
    steps = np.empty(len(slopes))
    for first, last in itertools.pairwise(hull):
        steps[first:last] = (losses[last] - losses[first]) / max(float(saved[last] - saved[first]), 1e-30)
    found = np.empty(len(slopes))
    order = slopes.argsort(kind="stable")
    found[order] = steps * (1 + 1e-12 * np.arange(len(slopes))) + 1e-300 * np.arange(len(slopes))
    return found


def _is_above(saved: Losses, losses: Losses, first: int, middle: int, last: int) -> bool:
    """Whether a point lies on or above the line between two others, or saves no more than the first."""
    rise, run = losses[last] - losses[first], saved[last] - saved[first]
    return bool((losses[middle] - losses[first]) * run >= rise * (saved[middle] - saved[first]))


def exchanges(grouping: Grouping, budgets: Sequence[str], seconds: float = 1.0) -> list[Exchange]:
    """What a MAC, a parameter and a second are worth under budgets; of several that are kept together, in several ways.

    At the best choice each is worth what it costs to save one more, and nothing where its budget does not bind: which
    mixture that is, the losses of the choices say.

    Args:
        grouping: of the module.
        budgets: of "macs", "parameters" and "seconds"; or "amount" alone.
        seconds: what the dense module takes.
    """
    names = [*dict.fromkeys(budgets)]
    if names == ["amount"]:
        return [{}]
    if len(names) == 1:
        return [{names[0]: 1.0}]
    macs, parameters, _ = grouping.dense
    whole = {"macs": max(macs, 1), "parameters": max(parameters, 1), "seconds": seconds}
    return [
        {name: share / whole[name] for name, share in zip(names, shares, strict=True)}
        for shares in _mixtures(len(names))
    ]


def _mixtures(count: int) -> list[tuple[float, ...]]:
    """Shares of several that add up to one."""
    if count == 2:
        return [(1 - share, share) for share in MIXTURES]
    several = [each for size in range(count, 0, -1) for each in itertools.combinations(range(count), size)]
    return [tuple((number in each) / len(each) for number in range(count)) for each in several]


def unit_prices(
    grouping: Grouping, groups: Sequence[ChannelGroup], exchange: Exchange, alive: Mask | None = None
) -> list[float]:
    """What one more unit of each group saves: of the dense module, or of what a choice has left.

    MACs are products of what writes channels and what reads them: what a unit saves falls with its neighbours.
    """
    if not exchange:
        return [1.0] * len(groups)
    if alive is None:
        alive = np.ones(grouping.found.classes.count, bool)
    totals = [
        (grouping.parameters if name == "parameters" else grouping.macs, worth)
        for name, worth in exchange.items()
        if worth
    ]
    return [_price(grouping, group, totals, alive) for group in groups]


def _price(grouping: Grouping, group: ChannelGroup, totals: Sequence[tuple[Total, float]], alive: Mask) -> float:
    left: Vector = group.units[alive[group.units]]
    if not len(left):
        return 1.0
    dead = grouping.units.dead(left[:1])
    return sum(worth * float(total(alive) - total(alive & ~dead)) for total, worth in totals)


def cheapest(
    curves: GroupCurves,
    priced: Sequence[Callable[[Mask | None], Sequence[Price]]],
    choose: Callable[[list[Scores]], Mask | None],
) -> list[Scores]:
    """The scores whose choice loses least: by the prices of the dense module, then of what the last choice left.

    Args:
        curves: of the groups. priced: what a unit saves, given what is left, in one way or in several.
        choose: from scores to what is left; None where no choice keeps the budget.
    """
    found = [_settled(curves, each, choose) for each in priced]
    return min(found, key=lambda each: each[1])[0]


def _settled(
    curves: GroupCurves,
    priced: Callable[[Mask | None], Sequence[Price]],
    choose: Callable[[list[Scores]], Mask | None],
) -> tuple[list[Scores], float]:
    """The scores, and what their choice loses."""
    best = scores = curves.scores(priced(None))
    least = float("inf")
    for _ in range(ROUNDS):
        alive = choose(scores)
        if alive is None or curves.loss(alive) >= least:
            break
        best, least = scores, curves.loss(alive)
        scores = curves.scores(priced(alive))
    return best, least
