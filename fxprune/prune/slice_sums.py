"""Scores of slices that are sums over them: the same bits, whatever number of processes hold rows of the weight.

A slice along axis 0 lies in one process, which sums it up by the kernel of torch that sums each row by itself. Along
another axis every process has a piece of each slice. There the rows are summed in pairs, then pairs of pairs, in one
tree over their numbers: a process gives the sums of those subtrees that it has whole, at most two of each level, and
the first one adds them up in the same tree. Only entries are added to entries, in an order that no cut changes; the
error grows with the logarithm of the number of rows.

The tree is pairwise summation: N. J. Higham, "The accuracy of floating point summation", SIAM Journal on Scientific
Computing 14 (1993), https://doi.org/10.1137/0914050. That a fixed tree makes sums reproducible: J. Demmel, H. D.
Nguyen, "Fast reproducible floating-point summation", IEEE ARITH 21 (2013), https://doi.org/10.1109/ARITH.2013.9.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.borrowing import asked
from fxprune.graph.working_memory import slices_at_once

_LEVELS = 6  # of the tree that are summed at once, in memory that is near: 64 rows
_Nodes = dict[tuple[int, int], Tensor]  # by level and number the sums of subtrees


@dataclass(frozen=True)
class SliceSums:
    """A score of slices by their sums, as `slices` of an importance.

    Attributes:
        order: 1 for magnitudes, 2 for squares, infinity for the largest magnitude; None for entries as they are.

    Example:
        >>> SliceSums(1.0).along(torch.tensor([[1.0, -2.0], [3.0, 4.0]]), 1)
        tensor([4., 6.])
    """

    order: float | None

    def __call__(self, values: Tensor, axes: tuple[int, ...]) -> Tensor:
        """Of a tensor that is here, the slices that `axes` lie within."""
        if self.order is None:
            return values.sum(axes)
        norms: Tensor = torch.linalg.vector_norm(values, self.order, dim=axes)
        return norms.square() if self.order == 2 else norms

    def along(self, values: Tensor, axis: int) -> Tensor:
        """One score for each index of an axis; of borrowed values a few sums come, and no whole."""
        if axis == 0:
            return torch.cat(asked(values, functools.partial(self._of_rows, count=len(values))))
        if self.order == math.inf:
            return torch.stack(asked(values, functools.partial(self._largest, axis=axis))).amax(0)
        nodes: _Nodes = {}
        for found in asked(values, functools.partial(self._subtrees, axis=axis)):
            nodes |= found
        return _root(nodes, values.shape[axis])

    def _of_rows(self, own: Tensor, start: int, *, count: int) -> Tensor:
        if len(own) == 1 < count:  # of one row alone torch may divide the entries among threads
            rows = _floating(own).reshape(1, -1)
            return self(torch.cat([rows, rows]), (1,))[:1].cpu()
        # so no part of several may have one row
        parts = max(1, min(len(own) // slices_at_once(own[:1].nbytes), len(own) // 2))
        pieces = (_floating(each).reshape(len(each), -1) for each in own.tensor_split(parts))
        return torch.cat([self(each, (1,)).cpu() for each in pieces])

    def _largest(self, own: Tensor, start: int, *, axis: int) -> Tensor:
        return self(_floating(own).movedim(axis, 0).flatten(1), (1,)).cpu()

    def _subtrees(self, own: Tensor, start: int, *, axis: int) -> Mapping[tuple[int, int], Tensor]:
        nodes, tops, first = _Nodes(), list[Tensor](), -(-start >> _LEVELS)
        for number, block in _blocks(own, start):
            rows = _summed_behind(self._entries(_floating(block).movedim(axis, 1)))
            if len(rows) < 1 << _LEVELS:
                _add_subtrees(nodes, rows, number, 0)
            else:
                for _ in range(_LEVELS):
                    rows = rows[0::2] + rows[1::2]
                tops.append(rows)
        if tops:
            _add_subtrees(nodes, torch.cat(tops), first, _LEVELS)
        return {key: node.cpu().clone() for key, node in nodes.items()}

    def _entries(self, values: Tensor) -> Tensor:
        if self.order is None:
            return values
        return values.square() if self.order == 2 else values.abs()


def _floating(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _blocks(own: Tensor, start: int) -> Iterator[tuple[int, Tensor]]:
    """Rows, and the number of the first, up to the next multiple of what is summed at once."""
    at, end = start, start + len(own)
    while at < end:
        after = min(end, ((at >> _LEVELS) + 1) << _LEVELS)
        yield at, own[at - start : after - start]
        at = after


def _summed_behind(rows: Tensor) -> Tensor:
    """Rows [rows, columns, ...] with sums over the further axes: [rows, columns]."""
    rows = rows.flatten(2) if rows.dim() > 2 else rows.unsqueeze(-1)
    while rows.shape[-1] > 1:
        even, odd = rows[..., 0::2], rows[..., 1::2]
        paired = even[..., : odd.shape[-1]] + odd
        rows = paired if even.shape == odd.shape else torch.cat([paired, even[..., -1:]], -1)
    return rows.squeeze(-1)


def _add_subtrees(nodes: _Nodes, rows: Tensor, first: int, level: int) -> None:
    """Add the largest subtrees that rows, or sums of a level, make up."""
    while len(rows):
        if first % 2:
            nodes[level, first] = rows[0]
            rows, first = rows[1:], first + 1
        if len(rows) % 2:
            nodes[level, first + len(rows) - 1] = rows[-1]
            rows = rows[:-1]
        if len(rows):
            rows = rows[0::2] + rows[1::2]
            first, level = first // 2, level + 1


def _root(nodes: _Nodes, size: int) -> Tensor:
    """The sum of all, from subtrees that make up the whole; where a right one is missing, the left one goes up."""
    if not nodes:
        return torch.zeros(size)
    level = min(level for level, _ in nodes)
    while len(nodes) > 1:
        for number in sorted(number for at, number in nodes if at == level):
            own, above = nodes.pop((level, number)), (level + 1, number // 2)
            nodes[above] = nodes[above] + own if above in nodes else own
        level += 1
    return next(iter(nodes.values()))
