"""Scores for a budget where losses are known: by what a unit saves, those whose choice loses least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from fxprune.channels.groups import ChannelGroup, Grouping, Scores
from fxprune.channels.ids import Mask, Vector
from fxprune.channels.stairs import Limit
from fxprune.prune.channel_budgets import MARGIN, SPENT, Budget, Size, Sizes, Speed
from fxprune.prune.channel_curves import Exchange, GroupCurves, Price, cheapest, exchanges, unit_prices
from fxprune.prune.channel_ranking import Ranked, landed, staircase
from fxprune.prune.channel_request import ChannelRequest
from fxprune.prune.latency.prices import LatencyPrices


def priced(
    budget: Budget, grouping: Grouping, picked: Sequence[ChannelGroup], ranked: Ranked, request: ChannelRequest
) -> Ranked:
    """With the scores whose choice loses least, where curves say what is lost."""
    curves, prices = ranked.curves, ranked.prices
    if curves is None:
        return ranked
    if isinstance(budget, Speed) and budget.sizes is not None:
        return _with_sizes(budget, budget.sizes, grouping, picked, ranked, request, curves)
    if prices is not None:
        return _timed(grouping, picked, ranked, request, curves, prices)
    if not request.is_of_sizes:
        return ranked
    return _by_sizes(budget, grouping, picked, ranked, request, curves)


def _ways(
    grouping: Grouping, picked: Sequence[ChannelGroup], found: Sequence[Exchange], prices: LatencyPrices | None = None
) -> list[Callable[[Mask | None], Sequence[Price]]]:
    """What a unit saves, given what is left, by each exchange."""

    def way(exchange: Exchange) -> Callable[[Mask | None], Sequence[Price]]:
        seconds = exchange.get("seconds", 0.0)
        sizes = {name: worth for name, worth in exchange.items() if name != "seconds"}

        def saved(alive: Mask | None) -> Sequence[Price]:
            each = unit_prices(grouping, picked, sizes, alive) if sizes else [0.0] * len(picked)
            if prices is None or not seconds:
                return each
            counts = [np.arange(group.size + 1) for group in picked]
            in_time = prices(alive)
            return [unit * count + seconds * own for unit, count, own in zip(each, counts, in_time, strict=True)]

        return saved

    return [way(exchange) for exchange in found]


def _by_sizes(
    budget: Budget,
    grouping: Grouping,
    picked: Sequence[ChannelGroup],
    ranked: Ranked,
    request: ChannelRequest,
    curves: GroupCurves,
) -> Ranked:
    """Of what keeps a budget of MACs, of parameters, or of both."""

    def choose(scores: list[Scores]) -> Mask | None:
        choice = landed(budget, picked, replace(ranked, scores=scores), request)
        return None if choice is None else ranked.masking.alive(choice.units)

    ways = _ways(grouping, picked, exchanges(grouping, request.sizes))
    return replace(ranked, scores=cheapest(curves, ways, choose))


def _timed(
    grouping: Grouping,
    picked: Sequence[ChannelGroup],
    ranked: Ranked,
    request: ChannelRequest,
    curves: GroupCurves,
    prices: LatencyPrices,
) -> Ranked:
    """Of what latencies expect to be as fast as is asked for."""
    ((_, wanted),) = request.budgets
    most = prices.table.whole_seconds / wanted

    def choose(scores: list[Scores]) -> Mask | None:
        stairs = staircase(Speed.roundings, Speed.timed, picked, replace(ranked, scores=scores), request)
        height = stairs.search(lambda units: prices.left(ranked.counting.alive(units)) <= most)
        return None if height is None else ranked.counting.alive(stairs.units(height))

    scores = cheapest(curves, [prices], choose)
    alive = choose(scores)
    start = None if alive is None else grouping.macs(alive) / max(grouping.dense[0], 1)
    return replace(ranked, scores=scores, start=start)


def _with_sizes(
    budget: Speed,
    sizes: Size | Sizes,
    grouping: Grouping,
    picked: Sequence[ChannelGroup],
    ranked: Ranked,
    request: ChannelRequest,
    curves: GroupCurves,
) -> Ranked:
    """Of what keeps sizes, if that is fast enough; else of what is expected to be, too.

    What time is expected is in proportion to latencies, or to MACs, from the choice by sizes, whose speed is measured.
    """
    by_sizes = _by_sizes(sizes, grouping, picked, ranked, request, curves)
    choice = landed(sizes, picked, by_sizes, request)
    if choice is None:
        return by_sizes
    reached = budget.measure(choice.units)
    if reached >= budget.wanted * MARGIN:
        return by_sizes
    prices = ranked.prices

    def expected(units: Vector) -> float:
        alive = ranked.counting.alive(units)
        return grouping.macs(alive) if prices is None else prices.left(alive)

    most = expected(choice.units) * reached / (budget.wanted * MARGIN)
    limit = Limit(lambda units: max(sizes.used(units), expected(units) / most), 1.0, SPENT)

    def choose(scores: list[Scores]) -> Mask | None:
        stairs = staircase(Speed.roundings, Speed.timed, picked, replace(ranked, scores=scores), request)
        units = stairs.land(limit)
        return None if units is None else ranked.masking.alive(units)

    names = [*request.sizes, "macs" if prices is None else "seconds"]
    found = exchanges(grouping, names, 1.0 if prices is None else prices.table.whole_seconds)
    return replace(ranked, scores=cheapest(curves, _ways(grouping, picked, found, prices), choose))
