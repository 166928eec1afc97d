"""Products of two activations, as queries and keys are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx


@dataclass(frozen=True, eq=False)
class Product:
    """A product of two activations, summed over channels of both, as queries and keys are.

    Attributes:
        node: the call.
        left, right: the operands, and the order of the axes of each in which positions and channels come last.
    """

    node: fx.Node
    left: tuple[fx.Node, tuple[int, ...]]
    right: tuple[fx.Node, tuple[int, ...]]

    def gram(self, values: Sequence[Tensor], counts: Tensor | None = None) -> Tensor:
        """[channels, channels], sums over all outputs of the products of what two channels add.

        Args:
            values: of the operands. counts: which samples, or which positions [samples, positions], count; None for
                all, as where the operands have other sizes.
        """
        left, right = (value.permute(order) for value, (_, order) in zip(values, (self.left, self.right), strict=True))
        grams = []
        for value in (left, right):
            rows = value if value.dim() > 2 else value[None]
            rows = rows if rows.dtype == torch.float64 else rows.float()
            rows = rows if counts is None else _counted(rows, counts)
            grams.append(rows.transpose(-1, -2) @ rows)
        first, second = grams
        if first.dim() == second.dim() > 3 and 1 < second.shape[-3] < first.shape[-3]:  # several query heads share keys
            second = second.repeat_interleave(first.shape[-3] // second.shape[-3], dim=-3)
        products = first.double() * second.double()
        return products.flatten(0, -3).sum(0)


def _counted(rows: Tensor, counts: Tensor) -> Tensor:
    """Rows [samples, ..., positions, channels], those that do not count as zeros."""
    sizes = (rows.shape[0], rows.shape[-2])[: counts.dim()]
    if tuple(counts.shape) != sizes:
        return rows
    shape = [len(counts), *[1] * (rows.dim() - 3), counts.shape[1] if counts.dim() == 2 else 1, 1]
    return rows * counts.reshape(shape).to(rows)
