"""The order in which units of channel groups go, and the stairs that it makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fxprune.channels.budget import ladders
from fxprune.channels.groups import ChannelGroup, Repair, Scores
from fxprune.channels.ids import Mask
from fxprune.channels.stairs import Staircase
from fxprune.prune.channel_budgets import Budget, Choice
from fxprune.prune.channel_curves import GroupCurves
from fxprune.prune.channel_request import ChannelRequest
from fxprune.prune.configured_levels import Level, Levels
from fxprune.prune.latency.prices import LatencyPrices


@dataclass(frozen=True)
class Ranked:
    """The order in which units go, and what that leaves.

    Attributes:
        scores: for each group of its units, comparable between groups.
        gone: for each group which of its units are masked already; these go first.
        started: for each group whether an earlier budget chose them.
        masking: with what is masked of the groups themselves, for the masks.
        counting: with all that is masked, for the budget: other groups are left alone, and count.
        curves: what is lost with the units, where that is known; scores are made of them.
        prices: what the units save in time, where latencies say so. start: the share of the MACs to try first then.
        levels: the only choices that there are, where a configuration says all widths by one number.
        within: the classes that may go: those of a choice for a smaller budget, of which a part is to stay; None: all.
    """

    scores: list[Scores]
    gone: list[Mask]
    started: list[bool]
    masking: Repair
    counting: Repair
    curves: GroupCurves | None = None
    prices: LatencyPrices | None = None
    start: float | None = None
    levels: Sequence[Level] = ()
    within: Mask | None = None

    def corrected(self, stays: Mask, lost: Mask) -> Ranked:
        """The same, where some classes stay whatever is chosen, and others are gone."""
        return replace(self, masking=self.masking.with_known(stays), counting=self.counting.with_known(stays, lost))


def staircase(
    roundings: Sequence[int | str],
    timed: bool,
    picked: Sequence[ChannelGroup],
    ranked: Ranked,
    request: ChannelRequest,
) -> Staircase:
    """The steps of the groups in the order of their scores; `roundings` and `timed` are as in `Budget`."""
    if not isinstance(request.round_to, str):
        roundings = (request.round_to, 1)
    most, least = request.max_per_group, request.at_least
    steps = ladders(picked, ranked.scores, roundings, most, least, timed, ranked.gone, ranked.started, ranked.within)
    return Staircase(steps, request.scope)


def stairs_of(budget: Budget, picked: Sequence[ChannelGroup], ranked: Ranked, request: ChannelRequest) -> Staircase:
    """The steps of the groups as a budget takes them."""
    return staircase(budget.roundings, budget.timed, picked, ranked, request)


def landed(budget: Budget, picked: Sequence[ChannelGroup], ranked: Ranked, request: ChannelRequest) -> Choice | None:
    """The choice that keeps the budget, None where none does."""
    if ranked.levels:
        ranks = [score - gone * (np.ptp(score) + 1) for score, gone in zip(ranked.scores, ranked.gone, strict=True)]
        return budget.fit(Levels(ranked.levels, picked, ranks, request.max_per_group, request.at_least))
    choice = budget.fit(stairs_of(budget, picked, ranked, request))
    if choice is None and ranked.within is not None:  # of a budget that is smaller than it was, as `finalize` counts
        return landed(budget, picked, replace(ranked, within=None), request)
    return choice
