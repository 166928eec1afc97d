"""Which positions of a reader's output are rows of its moments."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fxprune.prune.repair.batches import Piece
from fxprune.prune.repair.layers import ConvolutionReader, Reader

# So many rows a column are taken, and never fewer than the least; neighbouring positions of an image say much the same.
_MOST_ROWS, _LEAST_ROWS = 64, 2**16
_MOST_POSITIONS, _LEAST_POSITIONS = 16, 2**14
_MOST_ENTRIES = 2**24  # of inputs that are laid out as rows at once


class Rows:
    """The rows that are taken of every piece: as many of each sample, at other positions of each.

    Args:
        reader: whose. columns: how many of its columns count. samples: how many there will be in all.

    Attributes:
        stride: of so many positions one is taken; None before the first piece.
    """

    def __init__(self, reader: Reader, columns: int, samples: int) -> None:
        self._reader, self._columns, self._samples = reader, columns, samples
        self.stride: int | None = None

    def places(self, data: Tensor, piece: Piece) -> Iterator[tuple[Tensor, ...]]:
        """The positions that are taken of a piece, an index tensor an axis, in parts that fit in memory.

        Args:
            data: the input of the reader. piece: where it comes from.
        """
        positions = self._reader.positions(data)
        if self.stride is None:
            self.stride = self.stride_by(data, piece)
        columns = self._reader.sizes[0] * self._reader.sizes[2]
        for part in self._taken(positions, piece).split(max(_MOST_ENTRIES // columns, 1)):
            if len(part):
                yield tuple(index.to(data.device) for index in torch.unravel_index(part, positions))

    def stride_by(self, data: Tensor, piece: Piece) -> int:
        """Of how many positions one is taken, by the first piece."""
        rows = math.prod(self._reader.positions(data)) / piece.samples * self._samples
        is_image = isinstance(self._reader, ConvolutionReader)
        each, least = (_MOST_POSITIONS, _LEAST_POSITIONS) if is_image else (_MOST_ROWS, _LEAST_ROWS)
        return max(1, round(rows / max(least, each * self._columns)))

    def _taken(self, positions: tuple[int, ...], piece: Piece) -> Tensor:
        rows = torch.arange(math.prod(positions))
        leads = positions[0] == piece.samples
        each = max(math.prod(positions) // positions[0], 1) if leads else max(len(rows), 1)
        sample = rows.div(each, rounding_mode="floor") + piece.first
        taken = (rows % each + sample) % (self.stride or 1) == 0
        counts = piece.counts
        if counts is not None and tuple(counts.shape) == positions[: counts.dim()]:
            wide = counts.reshape(*counts.shape, *[1] * (len(positions) - counts.dim()))
            taken &= wide.expand(positions).flatten().cpu()
        return rows[taken]
