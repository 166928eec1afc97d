"""In which portions the units of a group can go: one at a time, or some of each cell where convolutions are grouped."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxprune.channels.groups import ChannelGroup
from fxprune.channels.ids import Vector


@dataclass(frozen=True, eq=False)
class Turns:
    """What goes together.

    Attributes:
        cells: [units], the number of the cell of each unit, of which turns have so many.
        counts: [turns, cells], how many units of each cell go with a turn; at least one unit is left.
    """

    cells: Vector
    counts: Vector

    @classmethod
    def one_by_one(cls, units: int) -> Turns:
        """Each unit by itself.

        Example:
            >>> Turns.one_by_one(3).counts.tolist()
            [[1], [1]]
        """
        return cls(np.zeros(units, np.int64), np.ones((units - 1, 1), np.int64))

    @classmethod
    def of(cls, group: ChannelGroup) -> Turns:
        """Those of a group: the parts of the steps of its block, as far as they concern it."""
        if group.block < 0:
            return cls.one_by_one(group.size)
        _, first, cells = np.unique(group.cells, return_index=True, return_inverse=True)
        cells = cells.reshape(-1)
        steps = int((np.bincount(cells) // group.share[first]).min())
        counts = np.tile(group.parts[first].T, (steps, 1))
        gone = counts.sum(1)
        counts = counts[(gone > 0) & (gone.cumsum() < group.size)]
        return cls(cells, counts) if len(counts) else cls.one_by_one(group.size)

    @property
    def sizes(self) -> Vector:
        """[turns], how many units are gone after each."""
        found: Vector = self.counts.sum(1).cumsum()
        return found

    def nearest(self, units: float) -> int:
        """The number of units after some turns that comes nearest to a number.

        Example:
            >>> Turns.one_by_one(4).nearest(3.6)
            3
        """
        if not len(self.counts):
            return 1
        return int(self.sizes[np.abs(self.sizes - round(units)).argmin()])

    def arranged(self, units: Tensor) -> Tensor:
        """The places of units in the order in which they go, given in an order of preference; what stays comes last.

        Args:
            units: [n], distinct.
        """
        places = [(self.cells[units.cpu().numpy()] == cell).nonzero()[0] for cell in range(self.counts.shape[1])]
        taken = np.zeros(len(places), np.int64)
        found = []
        for turn in self.counts:
            portion = [own[at : at + count] for own, at, count in zip(places, taken, turn, strict=True)]
            found.append(np.sort(np.concatenate(portion)))
            taken += turn
        found.append(np.sort(np.concatenate([own[at:] for own, at in zip(places, taken, strict=True)])))
        return torch.from_numpy(np.concatenate(found))
