"""Which units of channel groups go: groups, the order of their units, and the choice that keeps a budget."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fxprune import driver
from fxprune.artifacts.plain_layers import plain_in_class
from fxprune.channels.budget import masks
from fxprune.channels.computed_weights import with_plain_weights
from fxprune.channels.foresight import classes_left, foresee, forget, sizes_left
from fxprune.channels.groups import ChannelGroup, Grouping
from fxprune.channels.ids import Mask, Vector
from fxprune.errors import ArgumentError, PruningError, WriteBackError
from fxprune.graph.expanded import by_vectors, is_one_value
from fxprune.graph.masks import MasksOnDemand, masked, view
from fxprune.graph.traced import TracedModule
from fxprune.prune.channel_budgets import Amount, Budget, Choice, Macs, Size, Sizes, Speed
from fxprune.prune.channel_curves import GroupCurves, exchanges, unit_prices
from fxprune.prune.channel_pricing import ChannelPricing
from fxprune.prune.channel_ranking import Ranked, landed
from fxprune.prune.channel_request import ChannelRequest, chosen_groups
from fxprune.prune.channel_scores import comparable, is_relative, masked_units, scorable, unit_scores
from fxprune.prune.class_limits import ClassLimits, failure_in_class
from fxprune.prune.importance_registry import Evidence
from fxprune.prune.latency import LatencyTable
from fxprune.prune.latency.measuring import Timing, measured_latencies
from fxprune.prune.latency.prices import LatencyPrices
from fxprune.prune.losses import are_losses, losses
from fxprune.prune.runnable import runnable_groups
from fxprune.prune.trials import masked_copy

MOST_CORRECTIONS = 12


@dataclass(frozen=True)
class Candidates:
    """What budgets choose from.

    Attributes:
        traced: the module, as it was before the choice. grouping: of it.
        picked, lacking: the groups that are asked for, and those of them that the importance cannot score.
        decided: the axes of parameters of which a choice decides the counts, or an earlier one did.
        pricing: the order in which units go. table: the latencies by which losses are weighed, None without.
    """

    traced: TracedModule
    grouping: Grouping
    picked: list[ChannelGroup]
    lacking: list[ChannelGroup]
    decided: frozenset[tuple[str, int]]
    pricing: ChannelPricing
    table: LatencyTable | None


@dataclass(frozen=True)
class Outcome:
    """A choice among candidates.

    Attributes:
        among: the candidates.
        masks: those to insert, made when they are asked for.
        alive: the classes that the masks leave.
        macs, parameters: what `finalize` leaves of them.
        speedup: measured, None where it was not asked for.
        for_speed: whether units go that sizes did not ask for.
    """

    among: Candidates
    masks: Mapping[str, torch.Tensor]
    alive: Mask
    macs: int
    parameters: int
    speedup: float | None
    for_speed: bool = False


def candidates(
    before: TracedModule,
    request: ChannelRequest,
    evidence: Evidence,
    limits: ClassLimits | None = None,
    prices: str | LatencyTable = "auto",
    timing: Timing | None = None,
) -> Candidates:
    """What is chosen from, within what is known of a class; the same for requests that differ in values of budgets."""
    plain = driver.plain_view(before)
    names, staying = (None, {}) if limits is None else plain_in_class(plain, limits.model)
    grouping = Grouping(with_plain_weights(plain, names), for_class=limits is not None)
    if limits is not None:
        limits.staying |= staying
        grouping = runnable_groups(grouping, limits, lambda groups: chosen_groups(groups, request))
    picked, lacking = scorable(grouping, chosen_groups(grouping.groups, request), request.importance)
    decided = before.decided | _written_axes(picked)
    ranked = _ranked(before, grouping, picked, request, evidence, decided)
    ranked = replace(ranked, levels=[] if limits is None else limits.levels)
    table = None if timing is None else _latencies(before, grouping, picked, prices, timing)
    if table is not None:
        ranked = replace(ranked, prices=LatencyPrices(grouping, picked, table))
    return Candidates(
        before, grouping, picked, lacking, decided, ChannelPricing(grouping, picked, ranked, request), table
    )


def in_class(before: TracedModule, limits: ClassLimits | None, choose: Callable[[], Outcome]) -> Outcome:
    """A choice with which the class runs: one is made, tried, and made again with what is known then.

    Where every choice needs channels back as zeros, the last of them.

    Raises:
        PruningError: there is none.
    """
    running: Outcome | None = None
    failure: WriteBackError | None = None
    while True:
        try:
            outcome = choose()
            if limits is None:
                return outcome
            failure = failure_in_class(before, outcome.masks, outcome.among.decided, limits)
            if failure is None:
                return outcome
            running = outcome if failure.runs else running
            limits.learn(outcome.among.grouping, outcome.among.picked, failure)
        except PruningError as refusal:
            if running is not None:
                return running
            if failure is None or limits is None or str(failure) in str(refusal):
                raise
            why = f"{type(limits.model).__name__} was tried with fewer channels, the last time with this result"
            raise type(refusal)(f"{refusal} {why}: {failure}") from failure


def chosen(
    among: Candidates, request: ChannelRequest, measure: Callable[[Mapping[str, torch.Tensor]], float] | None = None
) -> Outcome:
    """The choice that keeps the budget, by what `finalize` leaves of it.

    The budget counts by relations of channels alone. What else stays or goes, since values say so, is seen by the
    analysis of the masked module; then it is known, and the choice is made again.
    """
    traced, grouping, picked, decided = among.traced, among.grouping, among.picked, among.decided
    speeds: dict[bytes, float] = {}

    def speed_of(alive: Mask) -> float:
        key = alive.tobytes()
        if key not in speeds:
            assert measure is not None
            speeds[key] = measure(_masks(traced, grouping, alive))
        return speeds[key]

    timer = None if measure is None else speed_of
    added, corrected = {name: 0 for name, _ in request.budgets}, False
    ranked = among.pricing.priced(_budget(grouping, picked, among.pricing.ranked, request, timer, added))
    for corrections in range(MOST_CORRECTIONS):
        budget = _budget(grouping, picked, ranked, request, timer, added)
        choice = _fit(budget, picked, ranked, request)
        alive, counted = ranked.masking.alive(choice.units), ranked.counting.alive(choice.units)
        wanted = _masks(traced, grouping, alive)
        analysis = foresee(grouping.plain, wanted, decided)
        left = classes_left(grouping, analysis)
        if left is not None and not np.array_equal(left, counted):
            forget(analysis)
            corrected, ranked = True, ranked.corrected(left & ~counted, counted & ~left)
            continue
        macs, parameters = grouping.macs(counted), grouping.parameters(counted)
        found: tuple[int, int] | None = (macs, parameters)
        if left is None or corrected or masked(traced):  # values have a say in what goes, and in biases
            by_values = left is None or corrected
            sizes = sizes_left(analysis, macs=by_values)
            found = None if sizes is None else (sizes.macs if by_values else macs, sizes.parameters)
        forget(analysis)
        if found is None:
            found = finalized_sizes(traced, wanted, decided)
        differences = {"macs": found[0] - macs, "parameters": found[1] - parameters}
        more = {name: differences.get(name, 0) for name in added}
        settles = corrections >= MOST_CORRECTIONS // 2  # what is added depends on the choice: the most of it counts
        if all(more[name] == there or (settles and more[name] < there) for name, there in added.items()):
            return Outcome(among, wanted, alive, *found, choice.speedup, choice.for_speed)
        added = {name: max(more[name], there) if settles else more[name] for name, there in added.items()}
    return Outcome(among, wanted, alive, *finalized_sizes(traced, wanted, decided), choice.speedup, choice.for_speed)


def _written_axes(groups: Sequence[ChannelGroup]) -> frozenset[tuple[str, int]]:
    """The axes of parameters that write the channels of groups."""
    return frozenset((m.parameter, m.axis) for group in groups for m in group.members if m.role == "writer")


def _ranked(
    traced: TracedModule,
    grouping: Grouping,
    picked: Sequence[ChannelGroup],
    request: ChannelRequest,
    evidence: Evidence,
    decided: frozenset[tuple[str, int]],
) -> Ranked:
    removable = [group for group in grouping.groups if group.reason is None]
    gone = dict(zip(map(id, removable), masked_units(traced, grouping, removable), strict=True))

    def masked_of(groups: Sequence[ChannelGroup]) -> Vector:
        return np.concatenate([group.units[gone[id(group)]] for group in groups])

    curves = _curves(traced, grouping, picked, request, evidence)
    if curves is None:
        scores = unit_scores(traced, grouping, picked, request.importance, evidence)
    else:
        first = exchanges(grouping, ["macs" if name == "speedup" else name for name, _ in request.budgets])[0]
        scores = curves.scores(unit_prices(grouping, picked, first))
    normalize = is_relative(request.importance) if request.normalize is None else request.normalize
    dead = [gone[id(group)] for group in picked]
    if normalize and request.scope == "global":
        scores = comparable(scores, dead)
    ranks = [(g, s - d * (np.ptp(s) + 1)) for g, d, s in zip(picked, dead, scores, strict=True)]
    repairs = (grouping.repair(masked_of(groups), ranks, "auto", decided) for groups in (picked, removable))
    started = [not traced.decided.isdisjoint(_written_axes([group])) for group in picked]
    masking, counting = repairs
    return Ranked(scores, dead, started, masking, counting, curves)


def _curves(
    traced: TracedModule,
    grouping: Grouping,
    picked: Sequence[ChannelGroup],
    request: ChannelRequest,
    evidence: Evidence,
) -> GroupCurves | None:
    """What the output loses with the units of groups, where the importance is that."""
    if not are_losses(request.importance):
        return None
    if request.normalize:
        raise ArgumentError(
            "normalize=True would be ignored: losses of the output compare across groups as they are. Leave it out."
        )
    found = losses(request.importance, traced, grouping, picked, evidence)
    curves = [found.curve_of(group) for group in picked]
    return GroupCurves(picked, [curve.slopes() for curve in curves], [curve.losses() for curve in curves])


def _latencies(
    traced: TracedModule,
    grouping: Grouping,
    picked: Sequence[ChannelGroup],
    prices: str | LatencyTable,
    timing: Timing,
) -> LatencyTable | None:
    """The latencies by which losses are weighed, None where MACs are what counts."""
    if isinstance(prices, LatencyTable):
        return prices
    return measured_latencies(traced, grouping, picked, timing) if prices == "latency" else None


def _fit(budget: Budget, picked: Sequence[ChannelGroup], ranked: Ranked, request: ChannelRequest) -> Choice:
    """The choice that keeps the budget."""
    choice = landed(budget, picked, ranked, request)
    if choice is None:
        raise budget.refusal(request)
    return choice


def finalized_sizes(
    traced: TracedModule, wanted: Mapping[str, torch.Tensor], decided: frozenset[tuple[str, int]]
) -> tuple[int, int]:
    """The MACs and parameters that `finalize` leaves."""
    candidate = masked_copy(traced, wanted, decided)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # finalize says it again
        plan = driver.finalize(candidate).plan
    assert plan is not None
    return plan.macs[1], plan.parameters[1]


def _budget(
    grouping: Grouping,
    picked: Sequence[ChannelGroup],
    ranked: Ranked,
    request: ChannelRequest,
    measure: Callable[[Mask], float] | None,
    added: Mapping[str, int],
) -> Budget:
    asked = dict(request.budgets)
    if "amount" in asked:
        return Amount(picked, ranked.masking.alive, asked["amount"])
    counted = [
        (Macs if name == "macs" else Size)(grouping, ranked.counting.alive, name, asked[name], added[name])
        for name in request.sizes
    ]
    sizes = Sizes(counted) if len(counted) > 1 else counted[0] if counted else None
    if measure is None:
        assert sizes is not None
        return sizes

    def speedup_of(units: Vector) -> float:
        return measure(ranked.masking.alive(units))

    return Speed(grouping, ranked.counting.alive, asked["speedup"], speedup_of, ranked.start, sizes)


def _masks(traced: TracedModule, grouping: Grouping, alive: Mask) -> MasksOnDemand:
    """The masks to insert: those of what is dead, times what is there."""
    wanted = masks(grouping, alive)
    present = {name: view(traced, name).mask for name in wanted}

    def made(name: str) -> torch.Tensor:
        there = present[name]
        return wanted[name] if there is None else _both(wanted[name], there)

    return MasksOnDemand(wanted, made)


def _both(mask: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """A boolean mask on top of one that is there; boolean where that holds nothing but zeros and ones."""

    def both(mask: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        kept = there != 0
        return mask & kept if torch.equal(there, kept.to(there.dtype)) else mask.to(there) * there

    if is_one_value(there) and there[(0,) * there.dim()] == 1:  # of which an earlier choice was taken back
        return mask.to(there.device)
    found: torch.Tensor = by_vectors(both, mask.to(there.device), there)
    return found
