"""Which channels can go without changing what the eval graph computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fxprune.channels import constants, eval_only
from fxprune.channels.coupling import Coupling, couple
from fxprune.channels.ids import Mask
from fxprune.channels.liveness import Liveness
from fxprune.channels.remaining import dead_that_stay
from fxprune.graph.names import parameter_count
from fxprune.graph.plan import ChannelPlan
from fxprune.graph.requirements import require_eval
from fxprune.graph.traced import TracedModule


@dataclass(frozen=True, eq=False, repr=False)
class Analysis:
    """What `analyze` found in one module; `remove` carries it out.

    Attributes:
        traced: the module.
        plan: what would stay and why, as data; what is folded where is known once it is carried out.
        coupling: the relations of its channels.
        alive: the classes that stay.
        names: the parameters and buffers that the graphs read.
    """

    traced: TracedModule
    plan: ChannelPlan
    coupling: Coupling
    alive: Mask
    names: frozenset[str]


def analyze(
    traced: TracedModule,
    *,
    align: str | int = "auto",
    keep_for_training: bool = False,
    keep_for_write_back: bool = False,
    refused: Mapping[str, str] | None = None,
) -> Analysis:
    """Find the channels whose removal does not change what the eval graph computes.

    Args:
        traced: a module with an eval graph; masks folded into its parameters.
        align: "auto" keeps dead channels where counts at convolutions then run faster, `traced.decided` axes aside, and
            constants of positions, which cost less time than a map that is added, and what only ranges of values make
            constant; an integer n, multiples of n.
        keep_for_training: whether what is constant in eval mode alone stays, and what ranges of values make constant,
            which training may change.
        keep_for_write_back: whether what is constant but for the border stays, whatever `align` is.
        refused: names of nodes whose channels stay, and why, whatever is known of their operators.

    Returns:
        The analysis, its plan in `plan`; `remove` carries it out on the same module.

    Raises:
        FinalizeError: there is no eval graph.

    Warns:
        AnalysisWarning: the rule of an operator raised something; its channels stay.

    Example:
        >>> analysis = analyze(traced, align=1)
        >>> analysis.plan.removed
        {'0.weight': {0: 3}, '0.bias': {0: 3}, '2.weight': {1: 3}}
    """
    require_eval(traced, "removing channels")
    keep_maps = keep_for_write_back or align == "auto"
    ranges = align != "auto" and not keep_for_training
    relations = _coupled(traced, refused, ranges=ranges, keep_maps=keep_maps)
    fixed, reached = constants.find(relations)
    live = Liveness(relations, align, reached, traced.decided)
    passing = eval_only.find(relations, live.alive, reached, fixed)
    left_alone: list[constants.Constant] = []
    while keep_for_training and passing.channels:
        left_alone += passing.constants
        relations = eval_only.pinned(relations, passing)
        fixed, reached = constants.find(relations, left_alone)
        live = Liveness(relations, align, reached, traced.decided)
        passing = eval_only.find(relations, live.alive, reached, fixed)
    plan = ChannelPlan(parameters=(parameter_count(traced), 0), constants=tuple(fixed))
    plan.eval_only = dict(passing.channels)
    fill_in(relations, live.alive, plan)
    plan.stayed = dead_that_stay(relations, live)
    plan.refused = dict(relations.stored.refused)
    if relations.walks["eval"].by_range:
        fewer = _coupled(traced, refused, ranges=False, keep_maps=keep_maps)
        plan.by_range = _more_gone(plan, fewer, Liveness(fewer, align, constants.find(fewer)[1], traced.decided).alive)
    return Analysis(traced, plan, relations, live.alive, frozenset(relations.parameters))


def _coupled(traced: TracedModule, refused: Mapping[str, str] | None, *, ranges: bool, keep_maps: bool) -> Coupling:
    relations = couple(traced, traced.graphs, refused=refused, ranges=ranges)
    for reader in relations.walks["eval"].readers:
        if keep_maps:
            reader.without_maps()
    return relations


def _more_gone(plan: ChannelPlan, relations: Coupling, alive: Mask) -> dict[str, int]:
    """By the name of a parameter how many more of its rows go than by other relations."""
    other = ChannelPlan()
    fill_in(relations, alive, other)
    more = {name: len(axes[0]) - len(plan.kept[name][0]) for name, axes in other.kept.items() if axes}
    return {name: count for name, count in more.items() if count > 0}


def fill_in(relations: Coupling, alive: Mask, plan: ChannelPlan) -> None:
    """The plan's shapes, kept indices and groups."""
    for name, axes in relations.parameters.items():
        shape = tuple(relations.tensors[name].shape)
        plan.shapes[name] = shape
        plan.kept[name] = {
            axis: torch.arange(shape[axis], device="cpu")
            if ids is None
            else torch.from_numpy(np.flatnonzero(alive[relations.of(ids)]))
            for axis, ids in enumerate(axes)
        }
    for walk in relations.walks.values():
        for balance in walk.balances:
            inputs, outputs = alive[relations.of(balance.inputs)], alive[relations.of(balance.outputs)]
            left = inputs.any(1) | outputs.any(1)
            own = outputs if balance.transposed else inputs
            index = np.flatnonzero(own[left].reshape(-1)) % own.shape[1]
            if left.any():  # else the whole layer leaves
                index = index.reshape(int(left.sum()), -1)
            plan.kept[balance.weight][1] = torch.from_numpy(index)
            plan.groups[balance.weight] = (left.size, int(left.sum()))
