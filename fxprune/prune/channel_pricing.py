"""Scores for a budget where losses are known: by what a unit saves, those whose choice loses least."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from fxprune.channels.groups import ChannelGroup, Grouping, Scores
from fxprune.channels.ids import Mask, Vector
from fxprune.channels.stairs import Limit
from fxprune.prune.channel_budgets import MARGIN, SPENT, Budget, Size, Sizes, Speed
from fxprune.prune.channel_curves import Exchange, GroupCurves, Price, cheapest, exchanges, unit_prices
from fxprune.prune.channel_ranking import Ranked, landed, staircase, stairs_of
from fxprune.prune.channel_request import ChannelRequest
from fxprune.prune.latency.prices import LatencyPrices

SMALLER = 20  # the smaller budgets that are looked at: multiples of this part of the dense module
NEAREST = 4  # the choices for smaller budgets of which a part may be taken


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
    if not isinstance(budget, Size | Sizes):
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
    budget: Size | Sizes,
    grouping: Grouping,
    picked: Sequence[ChannelGroup],
    ranked: Ranked,
    request: ChannelRequest,
    curves: GroupCurves,
) -> Ranked:
    """Of what keeps a budget of MACs, of parameters, or of both.

    What keeps a smaller budget keeps this one, too. Where its choice would lose less than what whole blocks of channels
    make of this one, a part of a smaller one's choice is taken, which loses less still, of several that which runs best
    in onnxruntime: of the budgets that are looked at, none is estimated to lose less than a larger one.
    """
    smaller: list[tuple[Ranked, Mask]] = []
    least = math.inf
    for own in [*_smaller(budget, ranked), budget]:
        best = _settled(own, grouping, picked, ranked, request, curves)
        alive = _left(own, picked, best, request)
        if alive is None:
            continue
        if curves.loss(alive) > least:
            parts = [replace(other, within=~left) for other, left in smaller[-NEAREST:]]
            left_by = [(part, _left(own, picked, part, request)) for part in parts]
            better = [(part, left) for part, left in left_by if left is not None and curves.loss(left) <= least]
            if better:  # always, but where what goes with units is not among the steps
                best, alive = min(better, key=lambda each: stairs_of(own, picked, each[0], request).waste(each[1]))
        smaller.append((best, alive))
        least = curves.loss(alive)
    return best


def _smaller(budget: Size | Sizes, ranked: Ranked) -> list[Size | Sizes]:
    """Budgets that leave less, the smallest first: of all the same parts of the dense module."""
    factors = [] if ranked.levels else [budget.whole * part / SMALLER for part in range(1, SMALLER)]
    return [budget.scaled(factor) for factor in factors if factor < 1]


def _settled(
    budget: Size | Sizes,
    grouping: Grouping,
    picked: Sequence[ChannelGroup],
    ranked: Ranked,
    request: ChannelRequest,
    curves: GroupCurves,
) -> Ranked:
    """By scores for a budget."""
    ways = _ways(grouping, picked, exchanges(grouping, request.sizes))

    def choose(scores: list[Scores]) -> Mask | None:
        return _left(budget, picked, replace(ranked, scores=scores), request)

    return replace(ranked, scores=cheapest(curves, ways, choose))


def _left(budget: Budget, picked: Sequence[ChannelGroup], ranked: Ranked, request: ChannelRequest) -> Mask | None:
    """The classes that the choice for a budget leaves, None where none keeps it."""
    choice = landed(budget, picked, ranked, request)
    return None if choice is None else ranked.masking.alive(choice.units)


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
