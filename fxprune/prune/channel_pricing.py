"""Scores for a budget where losses are known: by what a unit saves, those whose choice loses least."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fxprune.channels.groups import ChannelGroup, Grouping, Scores
from fxprune.channels.ids import Mask, Vector
from fxprune.channels.stairs import Limit, Staircase
from fxprune.prune.channel_budgets import MARGIN, SPENT, Budget, Size, Sizes, Speed
from fxprune.prune.channel_curves import Exchange, GroupCurves, Price, cheapest, exchanges, unit_prices
from fxprune.prune.channel_ranking import Ranked, landed, staircase, stairs_of
from fxprune.prune.channel_request import ChannelRequest
from fxprune.prune.latency.prices import LatencyPrices

SMALLER = 20  # the smaller budgets that are looked at: multiples of this part of the dense module
NEAREST = 4  # the choices for smaller budgets of which a part may be taken


@dataclass(frozen=True)
class ChannelPricing:
    """Groups, and the order in which their units go by what they save.

    Attributes:
        grouping: of the module. picked: the groups that are cut. ranked: the order without prices.
        request: what is asked for; of its budgets, the values may be others.
    """

    grouping: Grouping
    picked: Sequence[ChannelGroup]
    ranked: Ranked
    request: ChannelRequest
    # by the limits of a budget of sizes, what was found for it
    _found: dict[tuple[float, ...], tuple[Ranked, Mask | None]] = field(default_factory=dict, repr=False)

    def priced(self, budget: Budget) -> Ranked:
        """With the scores whose choice loses least, where curves say what is lost."""
        curves, prices = self.ranked.curves, self.ranked.prices
        if curves is None:
            return self.ranked
        if isinstance(budget, Speed):
            if budget.sizes is not None:
                return self._with_sizes(budget, budget.sizes, curves)
            return self.ranked if prices is None else self._timed(budget, curves, prices)
        return self._by_sizes(budget, curves) if isinstance(budget, Size | Sizes) else self.ranked

    def _ways(
        self, found: Sequence[Exchange], prices: LatencyPrices | None = None
    ) -> list[Callable[[Mask | None], Sequence[Price]]]:
        """What a unit saves, given what is left, by each exchange."""

        def way(exchange: Exchange) -> Callable[[Mask | None], Sequence[Price]]:
            seconds = exchange.get("seconds", 0.0)
            sizes = {name: worth for name, worth in exchange.items() if name != "seconds"}

            def saved(alive: Mask | None) -> Sequence[Price]:
                none = [0.0] * len(self.picked)
                each = unit_prices(self.grouping, self.picked, sizes, alive) if sizes else none
                if prices is None or not seconds:
                    return each
                counts = [np.arange(group.size + 1) for group in self.picked]
                in_time = prices(alive)
                return [unit * count + seconds * own for unit, count, own in zip(each, counts, in_time, strict=True)]

            return saved

        return [way(exchange) for exchange in found]

    def _by_sizes(self, budget: Size | Sizes, curves: GroupCurves) -> Ranked:
        """Of what keeps a budget of MACs, of parameters, or of both.

        What keeps a smaller budget keeps this one, too. Where its choice would lose less than what whole blocks of
        channels make of this one, a part of a smaller one's choice is taken, which loses less still, of several that
        which runs best in onnxruntime: of the budgets that are looked at, none is estimated to lose less than a larger
        one.
        """
        smaller: list[tuple[Ranked, Mask]] = []
        for own in [*self._smaller(budget), budget]:
            if own.limits not in self._found:
                self._found[own.limits] = self._beside(own, smaller, curves)
            best, alive = self._found[own.limits]
            if alive is not None:
                smaller.append((best, alive))
        return best

    def _smaller(self, budget: Size | Sizes) -> list[Size | Sizes]:
        """Budgets that leave less, the smallest first: of all the same parts of the dense module."""
        parts = [] if self.ranked.levels else [part / SMALLER for part in range(1, SMALLER)]
        return [budget.at(part) for part in parts if part * budget.whole < 1]

    def _beside(
        self, budget: Size | Sizes, smaller: Sequence[tuple[Ranked, Mask]], curves: GroupCurves
    ) -> tuple[Ranked, Mask | None]:
        """What is found for a budget, and what it leaves, given what was found for smaller ones."""
        best = self._settled(budget, curves)
        alive = self._left(budget, best)
        least = curves.loss(smaller[-1][1]) if smaller else math.inf
        if alive is None or curves.loss(alive) <= least:
            return best, alive
        parts = [replace(other, within=~left) for other, left in smaller[-NEAREST:]]
        left_by = [(part, self._left(budget, part)) for part in parts]
        better = [(part, left) for part, left in left_by if left is not None and curves.loss(left) <= least]
        if not better:  # what goes with units is not among the steps
            return best, alive
        return min(better, key=lambda each: stairs_of(budget, self.picked, each[0], self.request).waste(each[1]))

    def _settled(self, budget: Size | Sizes, curves: GroupCurves) -> Ranked:
        """By scores for a budget."""
        ways = self._ways(exchanges(self.grouping, self.request.sizes))

        def choose(scores: list[Scores]) -> Mask | None:
            return self._left(budget, replace(self.ranked, scores=scores))

        return replace(self.ranked, scores=cheapest(curves, ways, choose))

    def _left(self, budget: Budget, ranked: Ranked) -> Mask | None:
        """The classes that the choice for a budget leaves, None where none keeps it."""
        choice = landed(budget, self.picked, ranked, self.request)
        return None if choice is None else ranked.masking.alive(choice.units)

    def _timed_stairs(self, scores: list[Scores]) -> Staircase:
        return staircase(Speed.roundings, Speed.timed, self.picked, replace(self.ranked, scores=scores), self.request)

    def _timed(self, budget: Speed, curves: GroupCurves, prices: LatencyPrices) -> Ranked:
        """Of what latencies expect to be as fast as is asked for."""
        counting = self.ranked.counting
        most = prices.table.whole_seconds / budget.wanted

        def choose(scores: list[Scores]) -> Mask | None:
            stairs = self._timed_stairs(scores)
            height = stairs.search(lambda units: prices.left(counting.alive(units)) <= most)
            return None if height is None else counting.alive(stairs.units(height))

        scores = cheapest(curves, [prices], choose)
        alive = choose(scores)
        start = None if alive is None else self.grouping.macs(alive) / max(self.grouping.dense[0], 1)
        return replace(self.ranked, scores=scores, start=start)

    def _with_sizes(self, budget: Speed, sizes: Size | Sizes, curves: GroupCurves) -> Ranked:
        """Of what keeps sizes, if that is fast enough; else of what is expected to be, too.

        What time is expected is in proportion to latencies, or to MACs, from the choice by sizes, whose speed is
        measured.
        """
        by_sizes = self._by_sizes(sizes, curves)
        choice = landed(sizes, self.picked, by_sizes, self.request)
        if choice is None:
            return by_sizes
        reached = budget.measure(choice.units)
        if reached >= budget.wanted * MARGIN:
            return by_sizes
        prices, counting, masking = self.ranked.prices, self.ranked.counting, self.ranked.masking

        def expected(units: Vector) -> float:
            alive = counting.alive(units)
            return self.grouping.macs(alive) if prices is None else prices.left(alive)

        most = expected(choice.units) * reached / (budget.wanted * MARGIN)
        limit = Limit(lambda units: max(sizes.used(units), expected(units) / most), 1.0, SPENT)

        def choose(scores: list[Scores]) -> Mask | None:
            units = self._timed_stairs(scores).land(limit)
            return None if units is None else masking.alive(units)

        names = [*self.request.sizes, "macs" if prices is None else "seconds"]
        found = exchanges(self.grouping, names, 1.0 if prices is None else prices.table.whole_seconds)
        return replace(self.ranked, scores=cheapest(curves, self._ways(found, prices), choose))
