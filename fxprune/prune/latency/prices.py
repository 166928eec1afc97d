"""What units save in time: by measured latencies, and by what the neighbours have left."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fxprune.channels.budget import MOVED
from fxprune.channels.groups import ChannelGroup, Grouping
from fxprune.channels.ids import Mask
from fxprune.prune.latency.table import LatencyTable, Seconds


class LatencyPrices:
    """Seconds that are saved without some units.

    A table has each group alone, with its neighbours as they are. With fewer of these a unit saves less: as much less
    as it does of the work, MACs and elements that are moved.

    Args:
        grouping: of the module. groups: those that are pruned. table: of latencies.
    """

    def __init__(self, grouping: Grouping, groups: Sequence[ChannelGroup], table: LatencyTable) -> None:
        self._grouping, self._groups, self.table = grouping, groups, table
        self._saved = [table.saved(group) for group in groups]
        everything = np.ones(grouping.found.classes.count, bool)
        self._dense = [self._work(group, everything) for group in groups]

    def __call__(self, alive: Mask | None) -> list[Seconds]:
        """By group the seconds saved without 0, 1, ... units, where a choice has left so much of the others."""
        if alive is None:
            return self._saved
        return [factor * saved for factor, saved in zip(self._factors(alive), self._saved, strict=True)]

    def left(self, alive: Mask) -> float:
        """The seconds that the whole is expected to take.

        What two neighbours save together is less than the sum: each counts half as if the other were whole.
        """
        total = self.table.whole_seconds
        for group, factor, saved in zip(self._groups, self._factors(alive), self._saved, strict=True):
            total -= (1 + factor) / 2 * saved[int((~alive[group.units]).sum())]
        return float(total)

    def _factors(self, alive: Mask) -> list[float]:
        """By group what a unit saves of the work, as a share of what it saves of the dense module's."""
        return [
            self._work(group, alive) / dense if dense else 1.0
            for group, dense in zip(self._groups, self._dense, strict=True)
        ]

    def _work(self, group: ChannelGroup, alive: Mask) -> float:
        """What one more unit saves of MACs and traffic, traffic in MACs."""
        left = group.units[alive[group.units]]
        if not len(left):
            return 0.0
        fewer = alive & ~self._grouping.units.dead(left[:1])
        macs, traffic = self._grouping.macs, self._grouping.traffic
        return macs(alive) - macs(fewer) + MOVED * (traffic(alive) - traffic(fewer))
