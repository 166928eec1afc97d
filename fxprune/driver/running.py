"""Passes run on a traced module in place: all of what a call changes, or nothing."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fxprune.communication import agree
from fxprune.graph.requirements import require_traced
from fxprune.graph.spread_modules import failing_together
from fxprune.graph.taking_back import taken_back
from fxprune.graph.traced import TracedModule
from fxprune.passes import FINALIZE, FoldReparametrizations, InsertMasks, run_passes
from fxprune.passes.base import Pass
from fxprune.sharding import followed


@failing_together
def run(traced: TracedModule, *pipeline: Pass) -> None:
    """Run passes on a traced module in place."""
    require_traced(traced)
    pipeline[0].requires(traced)
    agree()  # what is refused on one process needs nothing taken back on another
    with followed(traced), taken_back(traced, (tensor for step in pipeline for tensor in step.written(traced))):
        run_passes(traced, pipeline)


def insert_masks(traced: TracedModule, masks: Mapping[str, torch.Tensor], *, compact: bool = False) -> None:
    """Insert or replace the masks of several parameters."""
    run(traced, InsertMasks(masks, compact))


def fold(traced: TracedModule, *names: str) -> None:
    """Make reparametrized parameters plain, in place."""
    run(traced, FoldReparametrizations(names))


def finalize_anew(*, on_demand: bool = False) -> list[Pass]:
    """The passes of `FINALIZE` for a module that shares its tensors."""
    fold = FoldReparametrizations(anew=True, on_demand=on_demand)
    return [fold if isinstance(step, FoldReparametrizations) else step for step in FINALIZE]
