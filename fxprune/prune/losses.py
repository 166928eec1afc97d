"""Importances that are losses of the output: measured on data under a name, or given as a `fxprune.Sensitivity`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxprune.channels.groups import ChannelGroup, Grouping
from fxprune.graph.traced import TracedModule
from fxprune.prune.importance_registry import IMPORTANCES, Evidence, UnitScore
from fxprune.prune.sensitivity import Sensitivity


def are_losses(importance: str | UnitScore) -> bool:
    """Whether an importance says what the output loses, and not what a unit scores."""
    if isinstance(importance, str):
        return IMPORTANCES[importance].curves is not None
    return isinstance(importance, Sensitivity)


def losses(
    importance: str | UnitScore,
    traced: TracedModule,
    grouping: Grouping,
    groups: Sequence[ChannelGroup],
    evidence: Evidence,
) -> Any:
    """Of such an importance, what has the curve of each group (`curve_of`): what was given, or is measured now."""
    if not isinstance(importance, str):
        return importance
    measure = IMPORTANCES[importance].curves
    assert measure is not None, importance
    return measure(traced, grouping, groups, evidence)
