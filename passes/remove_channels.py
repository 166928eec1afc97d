"""Take dead channels out of every graph."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from fxprune.calling import renamed
from fxprune.channels import ChannelPlan, analyze, impose, remove
from fxprune.channels.analysis import Analysis
from fxprune.channels.computed_weights import hold_values, mixed_weights, weights_of_names
from fxprune.errors import ArgumentError
from fxprune.graph.copies import read_directly
from fxprune.graph.requirements import require_eval
from fxprune.graph.traced import TracedModule

from .base import Pass


@renamed("check", "verify")
@dataclass(frozen=True)
class RemoveChannels(Pass):
    """Remove what does not change the outputs of the eval graph: rows that nothing reads, constants that fold.

    Masks must be folded before. The plan is left in `traced.plan`. `align` is "auto" (counts at convolutions stay
    multiples that run fast, exactness is untouched), 1 for the least, or the multiple to keep. With `plan` the sizes
    are those of a stored plan, and no constants are folded. `verify` compares the outputs and counts MACs. With
    `keep_for_training` channels stay that are constant in eval mode alone, with `keep_for_write_back` those that are
    constant but for the border; with `refused`, names of nodes and reasons, those that these touch. With `lean` weights
    are let go as they are cut: outputs that differ are an `OutputsDifferError`, which names no node. Weights that are
    standardized over all that they read become plain ones where channels go that they read.

    Example:
        >>> RemoveChannels(align=1)(traced).modified
        True
    """

    align: str | int = "auto"
    plan: ChannelPlan | None = None
    verify: bool = True
    keep_for_training: bool = False
    keep_for_write_back: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    lean: bool = False
    name: ClassVar[str] = "remove-channels"

    def requires(self, traced: TracedModule) -> None:
        require_eval(traced, self.name)
        if self.align != "auto" and (isinstance(self.align, bool) or not isinstance(self.align, int) or self.align < 1):
            raise ArgumentError(f'align={self.align!r}: "auto" or a positive integer is needed.')

    def run(self, traced: TracedModule) -> bool:
        if self.plan is None:
            plan = remove(traced, self._analyzed(traced), verify=self.verify, lean=self.lean)
        else:
            _without_copies(traced, self.plan)
            hold_values(traced, weights_of_names(traced, self.plan.held))
            plan = impose(traced, self.plan)
        return bool(plan.removed or plan.dropped)

    def _analyzed(self, traced: TracedModule) -> Analysis:
        """What can go; weights that are computed from all that they read are plain ones first where that frees more."""
        analysis = self._analysis(traced)
        if _without_copies(traced, analysis.plan):
            analysis = self._analysis(traced)
        if weights := mixed_weights(traced):
            copied = copy.deepcopy(traced)
            hold_values(copied, mixed_weights(copied))
            plan = self._analysis(copied).plan
            if _frees_more(plan, analysis.plan):
                cut = {name for name, axes in plan.removed.items() if 1 in axes}
                cut |= {name for name, (before, after) in plan.groups.items() if before != after}
                hold_values(traced, [weight for weight in weights if weight.name in cut])
                analysis = self._analysis(traced)
                # rows of those in groups, of which no column goes
                rest = [w for w in weights if w.name not in cut and _goes(plan, w.name) > _goes(analysis.plan, w.name)]
                if rest:
                    hold_values(traced, rest)
                    return self._analysis(traced)
        return analysis

    def _analysis(self, traced: TracedModule) -> Analysis:
        return analyze(
            traced,
            align=self.align,
            keep_for_training=self.keep_for_training,
            keep_for_write_back=self.keep_for_write_back,
            refused=self.refused,
        )


def _without_copies(traced: TracedModule, plan: ChannelPlan) -> bool:
    """Read what is cut where it is, not from copies, which are there for the last bit; whether there were any."""
    found = [read_directly(graph, plan.removed) for graph in traced.graphs.values()]
    if any(found):
        traced.recompile()
    return any(found)


def _goes(plan: ChannelPlan, name: str) -> int:
    """How many indices of the axes of a tensor a plan removes."""
    return sum(plan.removed.get(name, {}).values())


def _frees_more(plan: ChannelPlan, other: ChannelPlan) -> bool:
    """Whether a plan removes more of the tensors that both know."""
    names = plan.kept.keys() & other.kept.keys()
    return sum(_goes(plan, name) for name in names) > sum(_goes(other, name) for name in names)
