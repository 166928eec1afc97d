"""Data movement that writes over a part of a tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fxprune.channels.registry import OperatorCall, register
from fxprune.channels.values import Value, settled
from fxprune.channels.walk import Walk

aten = torch.ops.aten


@register(aten.index_copy)
@dataclass(frozen=True, eq=False)
class IndexCopy(OperatorCall):
    """Indices of one axis, given by a tensor, replaced by those of another tensor; as entries of a static cache are."""

    data: fx.Node
    dim: int
    index: fx.Node
    source: fx.Node

    def relate(self, walk: Walk) -> Value:
        value, source = walk.viewed(self.node, self.data), walk.value(self.source)
        dim = self.dim % value.rank
        walk.pin_operand(self.node, self.index, "used as an index")
        value = walk.blur(self.node, value, [dim], "written to by an index")
        source = walk.blur(self.node, source, [dim], "written to by an index")
        axes = list(value.axes)
        for other in (d for d in range(value.rank) if d != dim):
            axes[other] = axis = walk.join(self.node, [value.axes[other], source.axes[other]])
            value, source = (v if v.axes[other].is_one else v.relayout(other, axis) for v in (value, source))
        return settled(axes, value.zeros & source.zeros, torch.zeros(()))
