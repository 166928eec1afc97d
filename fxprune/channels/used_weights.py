"""Which weights of a layer are not zero, a bit each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxprune.borrowing import Borrowed, nonzero
from fxprune.channels.ids import Mask
from fxprune.graph.working_memory import slices_at_once


@dataclass(frozen=True, eq=False)
class UsedWeights:
    """Which entries of a table [groups, rows, columns] are not zero; made by `of` and `of_table`.

    Attributes:
        bits: [groups, rows, columns / 8].
        columns: of each group.

    Example:
        >>> used = UsedWeights.of(np.array([[[True, False, False], [False, False, True]]]))
        >>> used.columns_of_rows(np.array([[True, False]]))
        array([[ True, False, False]])
        >>> used.rows_with(np.array([[False, True, True]]))
        array([[False,  True]])
    """

    bits: NDArray[np.uint8]
    columns: int

    @classmethod
    def of(cls, used: Mask) -> UsedWeights:
        """From a boolean for each entry."""
        return cls(np.packbits(used, axis=-1), used.shape[-1])

    @classmethod
    def of_table(cls, table: Tensor) -> UsedWeights:
        """From a weight [groups, rows, columns, taps], a part of it at a time."""
        groups, rows, columns, taps = table.shape
        bits = np.zeros((groups, rows, -(-columns // 8)), np.uint8)
        if not bits.size:
            return cls(bits, columns)
        if isinstance(table, Borrowed):  # a bit an entry comes, and not the weight
            table = nonzero(table)
        many = slices_at_once(columns * taps * table.itemsize)  # rows at once, or whole groups where these are small
        for group in range(0, groups, max(1, many // rows)):
            own = slice(group, group + max(1, many // rows))
            for row in range(0, rows, many):
                bits[own, row : row + many] = _packed(table[own, row : row + many])
        return cls(bits, columns)

    def columns_of_rows(self, rows: Mask | None = None) -> Mask:
        """[groups, columns], the columns that these rows [groups, rows] have weights in; None: any row."""
        bits = self.bits
        if rows is not None:
            bits = bits[:, rows[0]] if len(rows) == 1 else np.where(rows[:, :, None], bits, np.uint8(0))
        return self._unpacked(np.bitwise_or.reduce(bits, axis=1))

    def of_group(self, group: int) -> Mask:
        """[rows, columns], which weights of a group are not zero."""
        return self._unpacked(self.bits[group])

    def columns_of(self, group: int, rows: Mask) -> Mask:
        """[columns], the columns of a group that these of its rows [rows] have weights in."""
        return self._unpacked(np.bitwise_or.reduce(self.bits[group, rows], axis=0))

    def rows_with(self, columns: Mask | None = None) -> Mask:
        """[groups, rows], the rows that have weights in these columns [groups, columns]; None: in any."""
        bits = self.bits if columns is None else self.bits & np.packbits(columns, axis=-1)[:, None]
        found: Mask = np.bitwise_or.reduce(bits, axis=-1) != 0
        return found

    def _unpacked(self, bits: NDArray[np.uint8]) -> Mask:
        return np.unpackbits(bits, axis=-1, count=self.columns).view(bool)


def slices_with_weights(tensor: Tensor, axis: int) -> Mask:
    """[size of the axis], which slices of a tensor hold an entry that is not zero, a part of it at a time."""
    others = [dim for dim in range(tensor.dim()) if dim != axis]
    found = torch.zeros(tensor.shape[axis], dtype=torch.bool)
    if isinstance(tensor, Borrowed):  # what is compared where it is comes as a boolean an entry
        found = (tensor != 0).any(dim=others).cpu() if others else (tensor != 0).cpu()
    else:
        for rows in _rows_at_a_time(tensor):
            used = tensor[rows] != 0
            own = (used.any(dim=others) if others else used).cpu()
            if axis == 0:
                found[rows] = own
            else:
                found |= own
    mask: Mask = found.numpy()
    return mask


def _rows_at_a_time(tensor: Tensor) -> Iterator[slice]:
    many = slices_at_once(tensor[:1].nbytes)
    for start in range(0, len(tensor), many):
        yield slice(start, start + many)


def _packed(table: Tensor) -> NDArray[Any]:
    """The bits of entries [..., columns, taps]."""
    nonzero = table.squeeze(-1) != 0 if table.shape[-1] == 1 else (table != 0).any(-1)
    return np.packbits(nonzero.numpy(), axis=-1)


NO_WEIGHTS = UsedWeights.of(np.zeros((0, 0, 0), bool))
