"""Modules under masks for a trial: what `finalize` leaves of them is looked at, and they are let go."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from fxprune import driver
from fxprune.graph.sharing_copies import sharing_copy
from fxprune.graph.traced import TracedModule


def masked_copy(
    traced: TracedModule, masks: Mapping[str, torch.Tensor], decided: Collection[tuple[str, int]]
) -> TracedModule:
    """A module under other masks, to be finalized, which makes a copy of its own: parameters are shared.

    Args:
        traced: the module, which stays as it is.
        masks: by the names of parameters; those of one axis are held as vectors.
        decided: the axes whose counts are decided.
    """
    candidate = sharing_copy(traced)
    driver.insert_masks(candidate, masks, compact=True)
    candidate.decide(decided)
    return candidate
