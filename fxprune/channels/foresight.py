"""What `finalize` will take out of a module once it is masked: the analysis itself, ahead of the masks."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import nn

from fxprune.channels.analysis import Analysis, analyze
from fxprune.channels.groups import Grouping
from fxprune.channels.ids import Mask
from fxprune.channels.removal import remove
from fxprune.graph.names import locate, tensors_of
from fxprune.graph.traced import TracedModule


def foresee(
    plain: TracedModule, masks: Mapping[str, torch.Tensor], decided: Collection[tuple[str, int]]
) -> Analysis:  # fmt: skip
    """The analysis that `finalize` will make by default; `plain` is only read, and shared where no mask is.

    Args:
        plain: a module without reparametrizations.
        masks: by the names of parameters.
        decided: the axes whose counts are decided.
    """
    tensors = tensors_of(plain)
    masked = {id(tensors[name]): tensors[name].detach() * mask.to(tensors[name].device) for name, mask in masks.items()}
    parameters = {key: nn.Parameter(value, requires_grad=False) for key, value in masked.items()}
    candidate = copy.deepcopy(plain, {id(tensor): tensor for tensor in tensors.values()})
    for name, tensor in tensors.items():
        if id(tensor) in parameters:
            owner, attribute = locate(candidate, name)
            owner._parameters[attribute] = parameters[id(tensor)]
    candidate.decide(decided)
    return analyze(candidate)


def parameters_left(analysis: Analysis) -> int | None:
    """How many parameters the module will have, biases that take up constants among them; `analysis` is used up.

    None where a change of the graph fails, so that `finalize` will leave channels for it.
    """
    try:
        return remove(analysis.traced, analysis, verify=False).parameters[1]
    except Exception:  # a registered operator's own changes may raise anything; finalize says what it was
        return None


def classes_left(grouping: Grouping, analysis: Analysis) -> Mask | None:
    """By class of a grouping what an analysis of the same graphs keeps; None where that cannot be said."""
    ours, theirs = grouping.found.classes, analysis.coupling.classes
    if analysis.plan.constants or ours.count != theirs.count or not np.array_equal(ours.of, theirs.of):
        return None
    return analysis.alive
