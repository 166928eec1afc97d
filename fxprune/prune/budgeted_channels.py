"""Masks on whole channels: coupled groups, scored, cut to a budget."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fxprune import driver
from fxprune.channels.budget import Staircase, ladders, masks
from fxprune.channels.groups import ChannelGroup, Grouping, Repair, Scores
from fxprune.channels.ids import Mask, Vector
from fxprune.errors import PruningError
from fxprune.graph.masks import view
from fxprune.graph.requirements import require_traced
from fxprune.graph.traced import TracedModule
from fxprune.prune.channel_budgets import Amount, Budget, Choice, Macs, Size, Speed
from fxprune.prune.channel_request import (
    DEFAULT_AMOUNT,
    ChannelRequest,
    Importance,
    check_evidence,
    chosen_groups,
    one_budget,
)
from fxprune.prune.channel_scores import comparable, masked_units, plain_names, scorable, unit_scores
from fxprune.prune.importance_registry import Evidence


@dataclass(frozen=True)
class ChannelReport:
    """What `fxprune.prune.channels` masked.

    Attributes:
        removed: by group, "name (kind)" -> (units masked, units in all).
        stayed: by group that was not considered, why.
        macs, parameters: (dense, after exact removal without alignment); MACs of one sample.
        speedup: measured in onnxruntime, None where it was not asked for.
        sample: what MACs are counted for, "one sample of 3x224x224".
    """

    removed: dict[str, tuple[int, int]]
    stayed: dict[str, str]
    macs: tuple[int, int]
    parameters: tuple[int, int]
    speedup: float | None = None
    sample: str = ""


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
    macs: float | None = None,
    parameters: float | None = None,
    speedup: float | None = None,
    seed: int | None = None,
    loader: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    batches: int | None = None,
    threads: int = 1,
    batch: int = 1,
    provider: str = "CPUExecutionProvider",
) -> ChannelReport:
    """Mask whole channels, by groups of slices that stand or fall together, so that `finalize` removes them exactly.

    The score of a unit is the mean over the slices that belong to it, of writers and readers alike, biases aside; for
    the global scope it is divided by its group's mean, so that layers of different scale compare. Both are the
    defaults of DepGraph (Fang et al., "DepGraph: Towards Any Structural Pruning", 2023, https://arxiv.org/abs/2301.12900).
    Rows of weights, biases, gains and shifts of normalizations are masked, and the columns that read them; training
    can go on, `finalize` makes it smaller. A unit that is masked already counts: called again with a smaller budget,
    the function masks more.

    Args:
        traced: the module, changed in place.
        amount: share of the units that goes (float) or their number (int); 0.5 where none of the budgets below, of
            which only one can be given, takes its place.
        importance: "l1", "l2", "linf" (norms of a slice, for l2 its square, as DepGraph takes it), "random", "bn"
            (gains of batch norm: Liu et al., "Network Slimming", 2017, https://arxiv.org/abs/1708.06519), "fpgm"
            (distance to the other filters: He et al., 2019, https://arxiv.org/abs/1811.00250), "taylor" (Molchanov et
            al., 2019, https://arxiv.org/abs/1906.10771; needs `loader` and `loss`), a name that was given to a score
            of entries by `fxprune.importance.register`, or a function from a `ChannelGroup` to a tensor [units]. "bn"
            leaves groups without a batch norm alone, and "fpgm" looks at the weights that write a group.
        scope: "global" compares units of all groups; "local" takes the same share of every group.
        targets: patterns of parameter or module names; groups that write one of these are pruned, None prunes all.
        ignore: patterns; groups with a member of such a name are left alone.
        kinds: the kinds of groups to prune, as in `ChannelGroup.kind`: "attention head", "MLP unit", ...; None: all.
        round_to: what stays of a group (of each conv group or head, where it has these) is rounded to the nearest
            multiple; "auto" takes 16 for convolutions, as onnxruntime computes them in blocks, and 1 for matrix
            products. Convolutions with fewer than 32 and 16 channels are cut to multiples of 8 and 4 where a budget
            cannot be kept else, and where `amount` is given; at last all are cut as they fall. Under a budget of MACs
            or speed, "auto" takes a multiple less where memory traffic makes MACs slow, and one more elsewhere.
        max_per_group: largest share of a group that goes. at_least: units that every group keeps.
        macs, parameters: what may be left, as a fraction of the dense model or as a count, of MACs for one sample.
            Where whole blocks would not use 2 % of it, the last one may be of another group whose score is at most
            half as much more.
        speedup: how many times faster in onnxruntime than `traced` finalized as it is, measured on this machine.
        seed: for "random"; None draws from the global generator.
        loader, loss, batches: for "taylor" and what is registered, as for `fxprune.importance.scores`.
        threads, batch, provider: of the measurement for `speedup`; a batch that is not free is the sample's.

    Returns:
        A `ChannelReport`.

    Raises:
        ArgumentError, ArgumentTypeError: contradictory, missing or unusable options.
        NameLookupError: a pattern matches nothing.
        PruningError: nothing may be pruned, a budget cannot be reached (the message has the best value), or scores
            are NaN. No mask is inserted then.

    Example:
        >>> report = fxprune.prune.channels(traced, macs=0.5)
        >>> final = fxprune.finalize(traced)
    """
    require_traced(traced)
    name, value = one_budget(amount, macs=macs, parameters=parameters, speedup=speedup)
    request = ChannelRequest(name, value, importance, scope, round_to, max_per_group, at_least)
    evidence = Evidence(loader, loss, batches, seed)
    check_evidence(importance, evidence)
    grouping = Grouping(driver.plain_view(traced))
    picked, lacking = scorable(grouping, chosen_groups(grouping.groups, targets, ignore, kinds), importance)
    ranked = _ranked(traced, grouping, picked, request, evidence)
    with contextlib.ExitStack() as stack:
        budget: Budget
        if name == "amount":
            budget = Amount(value)
        elif name == "speedup":
            measure = stack.enter_context(driver.stopwatch(traced, threads=threads, batch=batch, provider=provider))

            def speedup_of(units: Vector) -> float:
                return measure(_masks(traced, grouping, ranked.masking.alive(units)))

            budget = Speed(grouping, ranked.counting.alive, value, speedup_of)
        else:
            budget = (Macs if name == "macs" else Size)(grouping, ranked.counting.alive, name, value)
        choice = _fit(budget, picked, ranked.scores, request)
    alive = ranked.masking.alive(choice.units)
    driver.insert_masks(traced, _masks(traced, grouping, alive))
    left = ranked.counting.alive(choice.units)
    return _report(grouping, picked, lacking, alive, left, choice.speedup)


@dataclass(frozen=True)
class _Ranked:
    """The order in which units go, and what that leaves.

    Attributes:
        scores: for each group of its units, comparable between groups.
        masking: with what is masked of the groups themselves, for the masks.
        counting: with all that is masked, for the budget: other groups are left alone, and count.
    """

    scores: list[Scores]
    masking: Repair
    counting: Repair


def _ranked(
    traced: TracedModule,
    grouping: Grouping,
    picked: Sequence[ChannelGroup],
    request: ChannelRequest,
    evidence: Evidence,
) -> _Ranked:
    found = unit_scores(traced, grouping, picked, request.importance, evidence)
    removable = [group for group in grouping.groups if group.reason is None]
    gone = dict(zip(map(id, removable), masked_units(traced, grouping, removable), strict=True))
    scores = comparable(found, [gone[id(group)] for group in picked], request.scope)
    counted = request.round_to == "auto" and request.budget in ("macs", "parameters")
    align = "auto" if counted else 1  # what finalize will keep counts against the budget

    def repair(groups: Sequence[ChannelGroup]) -> Repair:
        masked = np.concatenate([group.units[gone[id(group)]] for group in groups])
        return grouping.repair(masked, list(zip(picked, scores, strict=True)), align)

    return _Ranked(scores, repair(picked), repair(removable))


def _fit(budget: Budget, picked: Sequence[ChannelGroup], scores: Sequence[Scores], request: ChannelRequest) -> Choice:
    """The first choice that keeps the budget, in the coarsest rounding that can."""
    chosen = request.round_to
    for rounding in budget.roundings if chosen == "auto" else (chosen,):
        candidates = _candidates(
            picked, scores, request, rounding, budget.timed if isinstance(rounding, str) else (False,)
        )
        if (choice := budget.fit(candidates)) is not None:
            return choice
    raise budget.refusal()


def _candidates(
    picked: Sequence[ChannelGroup],
    scores: Sequence[Scores],
    request: ChannelRequest,
    rounding: int | str,
    timed: Sequence[bool],
) -> Iterator[Staircase]:
    for counts_time in timed:
        steps = ladders(picked, scores, rounding, request.max_per_group, request.at_least, counts_time)
        yield Staircase(steps, request.scope)


def _masks(traced: TracedModule, grouping: Grouping, alive: Mask) -> dict[str, torch.Tensor]:
    """The masks to insert: those of what is dead, times what is there."""
    wanted = masks(grouping, alive)
    if hidden := sorted(wanted.keys() - plain_names(traced)):
        raise PruningError(
            f"{', '.join(hidden[:5])} of a chosen group is computed by a parametrization, which a channel mask would "
            "act on. Remove it first (fxprune.remove_weight_norm, fxprune.finalize), or name it in `ignore`."
        )
    present = {name: view(traced, name).mask for name in wanted}
    return {name: mask if (there := present[name]) is None else mask.to(there) * there for name, mask in wanted.items()}


def _report(
    grouping: Grouping,
    picked: Sequence[ChannelGroup],
    lacking: Sequence[ChannelGroup],
    alive: Mask,
    left: Mask,
    speedup: float | None,
) -> ChannelReport:
    """What was masked, by the classes that `alive` has, and what is left of the whole, by those that `left` has."""
    labels = _labels(grouping.groups)
    stayed = {labels[id(group)]: group.reason for group in grouping.groups if group.reason}
    stayed |= {labels[id(group)]: "no batch norm has its gain" for group in lacking}
    removed = {labels[id(group)]: (int((~alive[group.units]).sum()), group.size) for group in picked}
    macs, parameters, _ = grouping.dense
    sizes = (macs, grouping.macs(left)), (parameters, grouping.parameters(left))
    return ChannelReport(removed, stayed, *sizes, speedup, grouping.sample)


def _labels(groups: Sequence[ChannelGroup]) -> dict[int, str]:
    """By the identity of a group, "name (kind)", numbered from the second of that label on."""
    found, seen = dict[int, str](), Counter[str]()
    for group in groups:
        label = f"{group.name} ({group.kind})"
        seen[label] += 1
        found[id(group)] = label if seen[label] == 1 else f"{label} {seen[label]}"
    return found
