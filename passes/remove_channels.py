"""Take dead channels out of every graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from fxprune.calling import renamed
from fxprune.channels import ChannelPlan, analyze, impose, remove
from fxprune.errors import ArgumentError
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
    are let go as they are cut: outputs that differ are an `OutputsDifferError`, which names no node.

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
            analysis = analyze(
                traced,
                align=self.align,
                keep_for_training=self.keep_for_training,
                keep_for_write_back=self.keep_for_write_back,
                refused=self.refused,
            )
            plan = remove(traced, analysis, verify=self.verify, lean=self.lean)
        else:
            plan = impose(traced, self.plan)
        return bool(plan.removed or plan.dropped)
