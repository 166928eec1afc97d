"""Scores of the units of channel groups, by an importance of single entries, of slices, or of units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fxprune.channels.budget import slice_scores
from fxprune.channels.groups import ChannelGroup, Grouping, Scores
from fxprune.channels.ids import Mask
from fxprune.errors import PruningError
from fxprune.graph.masks import masked
from fxprune.graph.traced import TracedModule
from fxprune.prune.importance import scores
from fxprune.prune.importance_registry import IMPORTANCES, Evidence, SliceScore, UnitScore
from fxprune.prune.operands import bias_operands, gain_operands
from fxprune.prune.slice_sums import SliceSums


def unit_scores(
    traced: TracedModule,
    grouping: Grouping,
    groups: Sequence[ChannelGroup],
    importance: str | UnitScore,
    evidence: Evidence,
) -> list[Scores]:
    """For each group a score of each of its units: what is lost with it.

    Args:
        traced: the module that is pruned.
        grouping: the groups of its plain view.
        groups: those to score.
        importance: a registered name, or a function from a group to a tensor [units].
        evidence: for those that look at data, or draw.

    Raises:
        PruningError: a function gave something else.
    """
    if callable(importance):
        return [_given(importance, group) for group in groups]
    named = IMPORTANCES[importance]
    if named.units is not None:
        score = named.units(evidence)
        return [_given(score, group) for group in groups]
    if named.slices is not None:
        return _by_slices(grouping, groups, named.slices, named.reads)
    return _by_entries(traced, grouping, groups, importance, evidence)


def scorable(
    grouping: Grouping, groups: Sequence[ChannelGroup], importance: str | UnitScore
) -> tuple[list[ChannelGroup], list[ChannelGroup]]:
    """The groups that an importance can score, and those that lack what it reads; what goes with these is in neither.

    Raises:
        PruningError: it can score none.
    """
    if callable(importance) or IMPORTANCES[importance].reads != "gains":
        return list(groups), []
    gains = gain_operands(grouping.plain.graphs["eval"])
    lacking = [g for g in groups if gains.isdisjoint(m.parameter for m in g.members)]
    left, blocks = set(map(id, lacking)), {g.block for g in lacking if g.block >= 0}
    found = [g for g in groups if id(g) not in left and g.block not in blocks]
    if not found:
        raise PruningError(
            f'importance="{importance}" needs batch norms with a gain; no group that may be pruned has one.'
        )
    return found, lacking


def masked_units(traced: TracedModule, grouping: Grouping, groups: Sequence[ChannelGroup]) -> list[Mask]:
    """For each group which of its units are masked, or zero, already."""
    if not masked(traced):
        return [np.zeros(group.size, bool) for group in groups]
    return [largest == 0 for largest in unit_scores(traced, grouping, groups, "linf", Evidence())]


def comparable(found: Sequence[Scores], gone: Sequence[Mask]) -> list[Scores]:
    """Scores divided by the mean over what is left of their group, by which units of all groups are ordered.

    Args:
        found: for each group the scores of its units.
        gone: for each group which of its units are masked.
    """
    return [_relative(score, dead) for score, dead in zip(found, gone, strict=True)]


def is_relative(importance: str | UnitScore) -> bool:
    """Whether scores compare by what they are relative to their group's mean, where the caller leaves that open."""
    return not callable(importance) and IMPORTANCES[importance].relative


def _relative(score: Scores, dead: Mask) -> Scores:
    if dead.all():
        return score
    mean = score.mean(where=~dead)
    return score / mean if mean > 0 else score


def _given(score: UnitScore, group: ChannelGroup) -> Scores:
    value: Any = score(group)
    if (shape := np.shape(value)) != (group.size,):
        told = "NoneType: nothing is returned" if value is None else f"{type(value).__name__} of shape {tuple(shape)}"
        raise PruningError(f"importance gave a {told} for {group.name!r}, not a tensor [{group.size}].")
    found: Scores = torch.as_tensor(value).detach().double().cpu().numpy()
    return found


def _by_slices(
    grouping: Grouping,
    groups: Sequence[ChannelGroup],
    score: SliceScore,
    reads: str,
) -> list[Scores]:
    graph = grouping.plain.graphs["eval"]
    names = gain_operands(graph) if reads == "gains" else _members(groups) - bias_operands(graph)
    values = {name: grouping.plain.get_parameter(name).detach() for name in names}
    if reads == "filters":
        values = {name: value for name, value in values.items() if value.dim() > 1}
    return _mean_over_slices(grouping, groups, values, score, only_writers=reads == "filters")


def _by_entries(
    traced: TracedModule, grouping: Grouping, groups: Sequence[ChannelGroup], importance: str, evidence: Evidence
) -> list[Scores]:
    names = _members(groups) - bias_operands(grouping.plain.graphs["eval"])
    given = evidence._asdict()
    del given["weight"]  # of inputs that curves are measured on
    entries = scores(traced, sorted(names), importance, **given)
    return _mean_over_slices(grouping, groups, entries, SliceSums(None))


def _mean_over_slices(
    grouping: Grouping,
    groups: Sequence[ChannelGroup],
    values: Mapping[str, torch.Tensor],
    score: SliceScore,
    *,
    only_writers: bool = False,
) -> list[Scores]:
    def of_axis(name: str, axis: int, role: str) -> torch.Tensor | None:
        if name not in values or (only_writers and role == "reader"):
            return None
        if isinstance(score, SliceSums) and not (axis == 1 and name in grouping.axes.grouped):
            return score.along(values[name], axis)
        slices, within = grouping.axes.slices(name, axis, values[name])
        return score(slices if slices.dtype == torch.float64 else slices.float(), tuple(within)).flatten()

    found = slice_scores(grouping, of_axis)
    return [found[group.units] for group in groups]


def _members(groups: Sequence[ChannelGroup]) -> set[str]:
    return {member.parameter for group in groups for member in group.members}
