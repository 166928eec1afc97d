"""What `finalize` will take out of a module once it is masked: the analysis itself, ahead of the masks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from fxprune.channels.analysis import Analysis, analyze
from fxprune.channels.checking import macs_without_values
from fxprune.channels.groups import Grouping
from fxprune.channels.ids import Mask
from fxprune.channels.removal import remove
from fxprune.graph.names import locate, tensors_of
from fxprune.graph.on_demand import Latest, masked_on_demand
from fxprune.graph.sharing_copies import sharing_copy
from fxprune.graph.traced import TracedModule


def foresee(
    plain: TracedModule, masks: Mapping[str, torch.Tensor], decided: Collection[tuple[str, int]]
) -> Analysis:  # fmt: skip
    """The analysis that `finalize` will make by default; `plain` is only read, and shared where no mask is.

    Masked weights are computed whenever they are read, so that they are never all held.

    Args:
        plain: a module without reparametrizations.
        masks: by the names of parameters.
        decided: the axes whose counts are decided.
    """
    tensors = tensors_of(plain)
    latest = Latest(max((tensors[name].nbytes for name in masks), default=0))
    masked = dict[int, torch.Tensor]()
    for name in masks:
        stored = tensors[name].detach()
        masked[id(tensors[name])] = masked_on_demand(stored, partial(_on, masks, name, stored.device), latest)
    parameters = {key: nn.Parameter(value, requires_grad=False) for key, value in masked.items()}
    candidate = sharing_copy(plain)
    for name, tensor in tensors.items():
        if id(tensor) in parameters:
            owner, attribute = locate(candidate, name)
            owner._parameters[attribute] = parameters[id(tensor)]
    candidate.decide(decided)
    return analyze(candidate)


def _on(masks: Mapping[str, torch.Tensor], name: str, device: torch.device) -> torch.Tensor:
    return masks[name].to(device)


@dataclass(frozen=True)
class Sizes:
    """What is left: parameters, biases that take up constants among them, and multiply-accumulates of one sample."""

    parameters: int
    macs: int


def sizes_left(analysis: Analysis, *, macs: bool = True) -> Sizes | None:
    """What the module will have; `analysis` is used up. No weight is copied.

    None where a change of the graph fails, so that `finalize` will leave channels for it, or where the operators that
    are left cannot be counted without values.

    Args:
        analysis: what `foresee` gave.
        macs: whether to count them; else they are 0.
    """
    traced = analysis.traced
    try:
        plan = remove(traced, analysis, verify=False, hollow=True)
        return Sizes(plan.parameters[1], macs_without_values(traced) if macs else 0)
    except Exception:  # a registered operator's own changes may raise anything; finalize says what it was
        return None
    finally:
        forget(analysis)


def forget(analysis: Analysis) -> None:
    """Let go of what `foresee` made, masked weights above all: modules and graphs refer to themselves, and would stay.

    Neither the analysis nor its module is of any use then.
    """
    for walk in analysis.coupling.walks.values():
        walk.env.clear()
        walk.readers.clear()
    analysis.coupling.tensors.clear()
    for module in analysis.traced.modules():
        module._parameters.clear()


def classes_left(grouping: Grouping, analysis: Analysis) -> Mask | None:
    """By class of a grouping what an analysis of the same graphs keeps; None where that cannot be said."""
    ours, theirs = grouping.found.classes, analysis.coupling.classes
    if analysis.plan.constants or ours.count != theirs.count or not np.array_equal(ours.of, theirs.of):
        return None
    return analysis.alive
