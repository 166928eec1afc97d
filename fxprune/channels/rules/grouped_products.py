"""Products of rows with the matrix of their group, as mixtures of experts have them; which group is data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fxprune.channels.axes import sizes_of
from fxprune.channels.registry import Cost, OperatorCall, register_named
from fxprune.channels.rules.labels import Labels
from fxprune.channels.rules.products import Added, contract
from fxprune.channels.values import Value, settled
from fxprune.channels.walk import Result, Walk

_EVERY_GROUP = Labels.of_terms("mk", "gkn", "mgn")


@register_named("transformers.grouped_mm_fallback")
@dataclass(frozen=True, eq=False)
class GroupedProduct(OperatorCall):
    """Rows [m, k], sorted by group, times matrices [groups, k, n]; `offs` [groups] are where groups end.

    It reads what the product of each row with every matrix would: no matrix goes. Known to be zero is what is zero
    whichever matrix is taken.
    """

    data: fx.Node
    weight: fx.Node
    offs: fx.Node

    def relate(self, walk: Walk) -> Result:
        walk.pin_operand(self.node, self.offs, "says where groups end")
        rows, matrices = walk.value(self.data), walk.value(self.weight)
        products = contract(walk, self.node, _EVERY_GROUP, rows, matrices, Added(folds=False))
        products = walk.blur(self.node, products, [1], "each row takes the matrix that data says")
        axes = products.axes[0], products.axes[2]
        return settled(axes, products.zeros.squeeze(1), torch.zeros(()).double())

    def costs(self, env: Mapping[fx.Node, Result]) -> Sequence[Cost]:
        """Each row meets one matrix."""
        macs = float(math.prod(sizes_of(self.node)) * sizes_of(self.data)[-1])
        values = env.get(self.node), env.get(self.data)
        return [Cost(macs, tuple(value.axes[-1] for value in values if isinstance(value, Value)))]
