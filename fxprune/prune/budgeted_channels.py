"""Masks on whole channels: coupled groups, scored, cut to a budget."""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxprune import driver
from fxprune.calling import renamed
from fxprune.channels.budget import masks
from fxprune.channels.computed_weights import with_plain_weights
from fxprune.channels.foresight import classes_left, foresee, forget, sizes_left
from fxprune.channels.groups import ChannelGroup, Grouping
from fxprune.channels.ids import Mask, Vector
from fxprune.errors import ArgumentError, ArgumentTypeError, PruningError, WriteBackError
from fxprune.graph.expanded import by_vectors
from fxprune.graph.masks import MasksOnDemand, masked, view
from fxprune.graph.requirements import require_traced
from fxprune.graph.traced import TracedModule
from fxprune.graph.values import unmasked
from fxprune.progress import shown
from fxprune.prune.channel_budgets import (
    Amount,
    Budget,
    Choice,
    Macs,
    Size,
    Sizes,
    Speed,
    limit_of,
    share_of,
)
from fxprune.prune.channel_curves import GroupCurves, exchanges, unit_prices
from fxprune.prune.channel_pricing import priced
from fxprune.prune.channel_ranking import Ranked, landed
from fxprune.prune.channel_report import ChannelReport
from fxprune.prune.channel_request import (
    DEFAULT_AMOUNT,
    SIZES,
    ChannelRequest,
    Importance,
    asked_for,
    check_evidence,
    chosen_groups,
    listed,
    plain_number,
)
from fxprune.prune.channel_scores import (
    comparable,
    is_relative,
    masked_units,
    scorable,
    unit_scores,
)
from fxprune.prune.channels_of_all import chosen_for_all
from fxprune.prune.class_limits import ClassLimits, failure_in_class
from fxprune.prune.decisions import record, undone
from fxprune.prune.group_record import numbered_labels
from fxprune.prune.importance_registry import IMPORTANCES, Evidence
from fxprune.prune.latency import LatencyTable
from fxprune.prune.latency.measuring import Timing, check_prices, measured_latencies
from fxprune.prune.latency.prices import LatencyPrices
from fxprune.prune.runnable import runnable_groups
from fxprune.prune.sensitivity import Sensitivity

MOST_CORRECTIONS = 12


@renamed("batches", "max_batches")
@renamed("provider", "providers", lambda provider: (provider,))
@chosen_for_all
@shown("choose channels")
def channels(
    traced: TracedModule,
    amount: float | None = DEFAULT_AMOUNT,
    *,
    importance: Importance = "l2",
    scope: str = "global",
    targets: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] = (),
    kinds: str | Iterable[str] | None = None,
    round_to: int | str = "auto",
    max_per_group: float = 1.0,
    at_least: int = 1,
    normalize: bool | None = None,
    macs: float | None = None,
    parameters: float | None = None,
    speedup: float | None = None,
    seed: int | None = None,
    loader: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    weight: Callable[..., torch.Tensor] | None = None,
    max_batches: int | None = None,
    threads: int = 1,
    batch: int = 1,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    prices: str | LatencyTable = "auto",
    runnable: nn.Module | None = None,
    compact_masks: bool = False,
) -> ChannelReport:
    """Mask whole channels, by groups of slices that stand or fall together, so that `finalize` removes them exactly.

    The score of a unit is the mean over the slices that belong to it, of writers and readers alike, biases aside; for
    the global scope it is divided by its group's mean, so that layers of different scale compare (`normalize`). Both
    are the defaults of DepGraph (Fang et al., "DepGraph: Towards Any Structural Pruning", 2023,
    https://arxiv.org/abs/2301.12900). Rows of weights, biases, gains and shifts of normalizations are masked, and the
    columns that read them; training can go on, `finalize` makes it smaller.

    What is left is what `finalize` leaves by default: it rounds the counts of these channels no further. A budget is
    never exceeded, and used up to 2 % or, where units are larger, to a unit. A unit that is masked already counts, and
    goes first: called again with a smaller budget, the function masks more. As long as neither weights nor masks have
    changed, more of the same budget, by scores of weights alone, is chosen anew: steps end where one call does.

    Args:
        traced: the module, changed in place.
        amount: share of the units that goes (float) or their number (int); 0.5 where none of the budgets below takes
            its place. Of these, one can be given, or several: then all are kept, and the one that binds is used up.
        importance: "l1", "l2", "linf" (norms of a slice, for l2 its square, as DepGraph takes it), "random", "bn"
            (gains of batch norm: Liu et al., "Network Slimming", 2017, https://arxiv.org/abs/1708.06519), "fpgm"
            (distance to the other filters: He et al., 2019, https://arxiv.org/abs/1811.00250), "taylor" (Molchanov et
            al., 2019, https://arxiv.org/abs/1906.10771; needs `loader` and `loss`), a name that was given to a score
            of entries by `fxprune.importance.register`, or a function from a `ChannelGroup` to a tensor [units]. "bn"
            leaves groups without a batch norm alone, and "fpgm" looks at the weights that write a group. For trained
            networks, "obs": what the output loses when what is left makes up for the channels that went (Kurtic et al.,
            "ZipLM", 2023, https://arxiv.org/abs/2302.04089; `fxprune.sensitivity`, whose result is an importance, too);
            needs `loader`, and counts on `fxprune.reconstruct` afterwards, as masks alone make up for nothing.
        scope: "global" compares units of all groups; "local" takes the same share of every group.
        targets: patterns of parameter or module names; groups that write one of these are pruned, None prunes all.
        ignore: patterns; groups with a member of such a name are left alone.
        kinds: the kinds of groups to prune, as in `ChannelGroup.kind`: "attention head", "MLP unit", ...; None: all.
        round_to: what stays of a group (of each conv group or head, where it has these) is a multiple of it. "auto"
            takes 16 for convolutions, as onnxruntime computes them in blocks, and 1 for matrix products. Where a budget
            is not used up to 2 % by whole multiples, one to three groups are cut by multiples of 8, 4 or 1, in the way
            that costs the least latency, and a budget that multiples cannot reach is cut finer: with "auto" groups with
            fewer than 32 and 16 channels to multiples of 8 and 4 (under `amount` from the start), at last all as they
            fall. Under a budget of MACs or speed,
            "auto" takes a multiple less where memory traffic makes MACs slow, and one more elsewhere.
        max_per_group: largest share of a group that goes. at_least: units that every group keeps.
        normalize: whether scores are divided by their group's mean for the global scope. None does so for the built-in
            names; what a function gives, or was registered, is compared across groups as it is.
        macs, parameters: what may be left, as a fraction of the dense model or as a count, of MACs for one sample.
        speedup: how many times faster in onnxruntime than `traced` finalized as it is, measured on this machine.
        seed: for "random"; None draws from the global generator.
        loader, loss, max_batches: for "taylor" and what is registered, as for `fxprune.importance.scores`. For "obs",
            `loader` is batches of inputs without labels, as for `fxprune.sensitivity`, and `loss` its distance, a
            function `(outputs, outputs as they are) -> scalar`; None is "auto".
        weight: for "obs": called as the module is, gives the rows that count, a tensor [samples] or [samples,
            positions], zero for padding.
        threads, batch, providers: of the measurement for `speedup`; a batch that is not free is the sample's, providers
            are onnxruntime's, a list in order of preference.
        prices: for `speedup`, and losses of the output ("obs", a `fxprune.Sensitivity`): what these are weighed by:
            "macs", what a unit saves of them; "latency", what it saves in time, measured first as by
            `fxprune.latency_table`; such a table, which costs nothing. "auto" is "macs". The speed itself is measured
            in any case.
        runnable: the model that was traced: channels are chosen so that its class runs with what is left, for
            `fxprune.write_back`. Parts by `chunk` stay equal, group norms lose whole groups; of a model that is built
            from a configuration, as those of transformers are, what follows from one number changes alike, and what
            the configuration cannot say stays, with that as its reason, so that `from_pretrained` takes what comes
            back. What is chosen is then written back for a trial: where the class
            does not run with it, or needs zeros in its place, the module that fails gets less freedom, and channels
            are chosen again.
        compact_masks: whether a mask of rows or of columns alone holds one vector, expanded to the shape of the
            parameter, in place of an entry for each of the parameter's: for a network that fills the memory. Names,
            shapes, types and values are the same. torch refuses to write into such a mask in place; `load_state_dict`
            and `DistributedDataParallel(traced)` first let it have all entries. For a module in one process.

    Returns:
        A `ChannelReport`, which prints as a summary.

    Raises:
        ArgumentError, ArgumentTypeError: contradictory, missing or unusable options.
        NameLookupError: a pattern matches nothing.
        PruningError: nothing may be pruned, a budget cannot be reached (the message has the best value), or scores
            are NaN. No mask is inserted then.

    Example:
        >>> report = fxprune.prune.channels(traced, macs=0.5)
        >>> final = fxprune.finalize(traced)

        A trained network, with a list of batches of inputs:

        >>> report = fxprune.prune.channels(traced, macs=0.5, importance="obs", loader=batches)
        >>> repair = fxprune.reconstruct(traced, batches)
    """
    require_traced(traced)
    if isinstance(providers, str):
        raise ArgumentTypeError(f"providers={providers!r}: a list is needed, [{providers!r}].")
    request = ChannelRequest(
        asked_for(amount, macs=macs, parameters=parameters, speedup=speedup), importance, scope,
        plain_number(round_to), plain_number(max_per_group), plain_number(at_least), normalize,
        None if targets is None else listed(targets), listed(ignore), None if kinds is None else listed(kinds),
        runnable is not None,
    )  # fmt: skip
    if runnable is not None and (not isinstance(runnable, nn.Module) or isinstance(runnable, fx.GraphModule)):
        raise ArgumentTypeError(f"runnable is a {type(runnable).__name__}: the eager module that was traced is needed.")
    if runnable is not None and isinstance(loader, Iterator):  # it may be read more than once
        loader = list(itertools.islice(loader, max_batches))
    evidence = Evidence(loader, loss, max_batches, seed, weight)
    check_evidence(importance, evidence)
    if not isinstance(compact_masks, bool):
        raise ArgumentTypeError(f"compact_masks={compact_masks!r}: True or False is needed.")
    timing = Timing(threads, batch, tuple(providers))
    check_prices(prices, request, timing)
    before, earlier = undone(traced, request)
    limits = None if runnable is None else ClassLimits(runnable)
    if limits is not None and _is_costly(request, evidence, prices):
        _in_class(before, limits, lambda: _outcome(before, _cheap(request), Evidence(None), limits))
    with contextlib.ExitStack() as stack:
        measure = None
        if request.asks_for("speedup"):
            measure = stack.enter_context(driver.stopwatch(before, threads=threads, batch=batch, providers=providers))
        chosen = _in_class(before, limits, lambda: _outcome(before, request, evidence, limits, measure, prices, timing))
    earlier = {**{name: view(before, name).mask for name in chosen.found.masks}, **earlier}
    found = chosen.found.masks
    wanted = MasksOnDemand(earlier, lambda name: found[name] if name in found else _mask_or_ones(before, name))
    driver.insert_masks(traced, wanted, compact=compact_masks)
    record(traced, request, chosen.decided, earlier)
    return _report(chosen.grouping, chosen.picked, chosen.lacking, chosen.found, request, chosen.table)


@dataclass(frozen=True)
class _Outcome:
    """A choice among groups, as `channels` reports it."""

    grouping: Grouping
    picked: list[ChannelGroup]
    lacking: list[ChannelGroup]
    decided: frozenset[tuple[str, int]]
    found: _Found
    table: LatencyTable | None


def _outcome(
    before: TracedModule,
    request: ChannelRequest,
    evidence: Evidence,
    limits: ClassLimits | None = None,
    measure: Callable[[Mapping[str, torch.Tensor]], float] | None = None,
    prices: str | LatencyTable = "auto",
    timing: Timing | None = None,
) -> _Outcome:
    """The choice, within what is known of a class."""
    plain = driver.plain_view(before)
    plain = with_plain_weights(plain) if limits is None else plain
    grouping = Grouping(plain, for_class=limits is not None)
    if limits is not None:
        grouping = runnable_groups(grouping, limits, lambda groups: chosen_groups(groups, request))
    picked, lacking = scorable(grouping, chosen_groups(grouping.groups, request), request.importance)
    decided = before.decided | _written_axes(picked)
    ranked = _ranked(before, grouping, picked, request, evidence, decided)
    ranked = replace(ranked, levels=[] if limits is None else limits.levels)
    table = None if timing is None else _latencies(before, grouping, picked, prices, timing)
    if table is not None:
        ranked = replace(ranked, prices=LatencyPrices(grouping, picked, table))
    found = _chosen(before, grouping, picked, ranked, request, decided, measure)
    return _Outcome(grouping, picked, lacking, decided, found, table)


def _in_class(before: TracedModule, limits: ClassLimits | None, choose: Callable[[], _Outcome]) -> _Outcome:
    """A choice with which the class runs: one is made, tried, and made again with what is known then.

    Where every choice needs channels back as zeros, the last of them.

    Raises:
        PruningError: there is none.
    """
    running: _Outcome | None = None
    failure: WriteBackError | None = None
    while True:
        try:
            outcome = choose()
            if limits is None:
                return outcome
            failure = failure_in_class(before, outcome.found.masks, outcome.decided, limits.model)
            if failure is None:
                return outcome
            running = outcome if failure.runs else running
            limits.learn(outcome.grouping, outcome.picked, failure)
        except PruningError as refusal:
            if running is not None:
                return running
            if failure is None or limits is None or str(failure) in str(refusal):
                raise
            why = f"{type(limits.model).__name__} was tried with fewer channels, the last time with this result"
            raise type(refusal)(f"{refusal} {why}: {failure}") from failure


def _is_costly(request: ChannelRequest, evidence: Evidence, prices: str | LatencyTable) -> bool:
    """Whether a choice needs data or measurements, so that it had better not be made again and again."""
    return evidence.loader is not None or request.asks_for("speedup") or prices == "latency"


def _cheap(request: ChannelRequest) -> ChannelRequest:
    """A request for a choice that is alike, by weights alone."""
    budgets = request.budgets if request.is_of_sizes else (("amount", 0.5),)
    return replace(request, importance="l2", normalize=None, budgets=budgets)


def _mask_or_ones(traced: TracedModule, name: str) -> torch.Tensor:
    own = view(traced, name)
    if own.mask is not None:
        return own.mask
    values = unmasked(traced, own)
    return torch.ones((), dtype=values.dtype, device=values.device).expand(values.shape)


@dataclass(frozen=True)
class _Found:
    """A choice of units.

    Attributes:
        masks: those to insert, made when they are asked for.
        alive: the classes that the masks leave.
        macs, parameters: what `finalize` leaves of them.
        speedup: measured, None where it was not asked for.
        for_speed: whether units go that sizes did not ask for.
    """

    masks: Mapping[str, torch.Tensor]
    alive: Mask
    macs: int
    parameters: int
    speedup: float | None
    for_speed: bool = False


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
    importance = request.importance
    measure = IMPORTANCES[importance].curves if isinstance(importance, str) else None
    given = importance if isinstance(importance, Sensitivity) else None
    if measure is None and given is None:
        return None
    if request.normalize:
        raise ArgumentError(
            "normalize=True would be ignored: losses of the output compare across groups as they are. Leave it out."
        )
    found: Any = given if measure is None else measure(traced, grouping, picked, evidence)
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


def _chosen(
    traced: TracedModule,
    grouping: Grouping,
    picked: Sequence[ChannelGroup],
    ranked: Ranked,
    request: ChannelRequest,
    decided: frozenset[tuple[str, int]],
    measure: Callable[[Mapping[str, torch.Tensor]], float] | None,
) -> _Found:
    """The choice that keeps the budget, by what `finalize` leaves of it.

    The budget counts by relations of channels alone. What else stays or goes, since values say so, is seen by the
    analysis of the masked module; then it is known, and the choice is made again.
    """
    speeds: dict[bytes, float] = {}

    def speed_of(alive: Mask) -> float:
        key = alive.tobytes()
        if key not in speeds:
            assert measure is not None
            speeds[key] = measure(_masks(traced, grouping, alive))
        return speeds[key]

    timer = None if measure is None else speed_of
    added, corrected = {name: 0 for name, _ in request.budgets}, False
    ranked = priced(_budget(grouping, picked, ranked, request, timer, added), grouping, picked, ranked, request)
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
            found = _finalized(traced, wanted, decided)
        differences = {"macs": found[0] - macs, "parameters": found[1] - parameters}
        more = {name: differences.get(name, 0) for name in added}
        settles = corrections >= MOST_CORRECTIONS // 2  # what is added depends on the choice: the most of it counts
        if all(more[name] == there or (settles and more[name] < there) for name, there in added.items()):
            return _Found(wanted, alive, *found, choice.speedup, choice.for_speed)
        added = {name: max(more[name], there) if settles else more[name] for name, there in added.items()}
    return _Found(wanted, alive, *_finalized(traced, wanted, decided), choice.speedup, choice.for_speed)


def _fit(budget: Budget, picked: Sequence[ChannelGroup], ranked: Ranked, request: ChannelRequest) -> Choice:
    """The choice that keeps the budget."""
    choice = landed(budget, picked, ranked, request)
    if choice is None:
        raise budget.refusal()
    return choice


def _finalized(
    traced: TracedModule, wanted: Mapping[str, torch.Tensor], decided: frozenset[tuple[str, int]]
) -> tuple[int, int]:
    """The MACs and parameters that `finalize` leaves."""
    # finalize makes a copy of its own, and masks are beside the weights
    candidate = copy.deepcopy(traced, {id(parameter): parameter for parameter in traced.parameters()})
    driver.insert_masks(candidate, wanted)
    candidate.decide(decided)
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

    found: torch.Tensor = by_vectors(both, mask.to(there.device), there)
    return found


def _binding(grouping: Grouping, request: ChannelRequest, found: _Found) -> str:
    """The budget that more goes for than for the others: of sizes, that of which the largest share is left."""
    if found.for_speed or not request.sizes:
        return request.budgets[-1][0]
    left, dense = {"macs": found.macs, "parameters": found.parameters}, dict(zip(SIZES, grouping.dense, strict=False))
    asked = dict(request.budgets)
    used = {name: share_of(left[name], limit_of(asked[name], dense[name])) for name in request.sizes}
    return max(request.sizes, key=lambda name: used[name])


def _report(
    grouping: Grouping,
    picked: Sequence[ChannelGroup],
    lacking: Sequence[ChannelGroup],
    found: _Found,
    request: ChannelRequest,
    latencies: LatencyTable | None,
) -> ChannelReport:
    labels = dict(zip(map(id, grouping.groups), numbered_labels(grouping.groups), strict=True))
    stayed = {labels[id(group)]: group.reason for group in grouping.groups if group.reason}
    stayed |= {labels[id(group)]: "no batch norm has its gain" for group in lacking}
    removed = {labels[id(group)]: (int((~found.alive[group.units]).sum()), group.size) for group in picked}
    macs, parameters, _ = grouping.dense
    sizes = (macs, found.macs), (parameters, found.parameters)
    budget = _binding(grouping, request, found)
    return ChannelReport(
        removed, stayed, *sizes, found.speedup, grouping.sample, budget, latencies, asked=dict(request.budgets)
    )
