"""Latencies by group of channels and count of units: data, a table, and prices for a budget of speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fxprune.channels.groups import ChannelGroup
from fxprune.errors import PruningError
from fxprune.prune.group_record import GroupRecord, record_of
from fxprune.reports import Readable, columns, counted, first_of

Seconds = NDArray[np.float64]

SURE = 2.0  # what a curve saves at most, in standard errors of it, where it is told from noise
_SHOWN = (0.25, 0.5, 0.75)


@dataclass(frozen=True, eq=False)
class LatencyCurve(GroupRecord):
    """How long the layers that touch one group run, by how many of its units are gone.

    Attributes:
        name, kind, size, members, units: as in `GroupRecord`.
        counts: numbers of units that are gone, 0 first; none where nothing was measured.
        seconds, error_seconds: what its layers take then, and the standard error of what that saves.
        share: the group's part of what is saved, below 1 where others lose units with it.
        why: why MACs say what its units save; empty where latencies do.
    """

    counts: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()
    error_seconds: tuple[float, ...] = ()
    share: float = 1.0
    why: str = ""

    def saved(self) -> Seconds:
        """The seconds that are saved without 0, 1, ... all units, float64 [size + 1]; it never falls.

        Between two counts it is straight, and beyond the last goes on as it was.
        """
        seconds = np.array(self.seconds)
        levels = _rising(seconds[0] - seconds) * self.share
        steep = (levels[-1] - levels[-2]) / (self.counts[-1] - self.counts[-2])
        beyond = levels[-1] + steep * (self.size - self.counts[-1])
        found: Seconds = np.interp(np.arange(self.size + 1), [*self.counts, self.size + 1e-9], [*levels, beyond])
        return found

    def is_noise(self) -> bool:
        """Whether what was measured does not tell counts apart."""
        return bool(_rising(self.seconds[0] - np.array(self.seconds))[-1] <= SURE * max(self.error_seconds))


@dataclass(frozen=True, repr=False)
class LatencyTable(Readable):
    """Latencies in onnxruntime of the layers that touch each group, by how many of its units are left.

    `fxprune.prune.channels(traced, speedup=1.5, importance=sensitivity, prices=table)` weighs what the output loses by
    them. It holds for the module that was measured, others of the same graph, and the machine.

    Attributes:
        curves: one a group, in the order of the network. whole_seconds: what the whole module takes.
        seconds_per_mac: for groups that have no latencies.
        threads, batch, providers: what was measured with. sample: what MACs are counted for.
        pieces: how many different ones were measured. cost_seconds: what that took, exports included.

    Example:
        >>> table = fxprune.latency_table(traced)
        >>> print(table.table())
        >>> for speedup in (1.2, 1.5):
        ...     report = fxprune.prune.channels(
        ...         copy.deepcopy(traced), speedup=speedup, importance=sensitivity, prices=table
        ...     )
    """

    curves: tuple[LatencyCurve, ...]
    whole_seconds: float
    seconds_per_mac: float
    threads: int
    batch: int
    providers: tuple[str, ...]
    sample: str
    pieces: int
    cost_seconds: float

    def saved(self, group: ChannelGroup) -> Seconds:
        """The seconds saved without 0, 1, ... all units of a group, float64 [size + 1]: by MACs where it must be.

        Raises:
            PruningError: it was not measured, or had other units then.
        """
        curve = record_of(self.curves, group)
        if curve is None:
            raise PruningError(
                f"the table of latencies has nothing of {group.name!r} ({group.kind}, {group.size} units). Measure the "
                "module that is pruned: fxprune.latency_table(traced)."
            )
        units: Seconds = np.arange(group.size + 1, dtype=np.float64)
        by_macs: Seconds = units * group.macs * self.seconds_per_mac
        if curve.why:
            return by_macs
        found: Seconds = curve.saved()
        found += 1e-3 * found[-1] / max(group.size, 1) * units  # where latency is flat, units count
        return found

    def __str__(self) -> str:
        unsure = [curve for curve in self.curves if curve.why]
        there = len(self.curves) - len(unsure)
        groups, pieces = counted(len(self.curves), "group"), counted(self.pieces, "piece")
        text = (
            f"latencies of {there} of {groups}, {pieces} measured in {self.cost_seconds:.1f} s; the whole takes "
            f"{1e3 * self.whole_seconds:.3f} ms with {counted(self.threads, 'thread')}, batch {self.batch}, "
            f"{first_of(self.providers)}"
        )
        if unsure:
            told = first_of((f"{curve.name} ({curve.why})" for curve in unsure), 3)
            text += f"\nby MACs: {told}"
        return text

    def table(self) -> str:
        """A line for each group: what its layers take with all units, and what is saved without some."""
        heads = [f"{share:.0%} gone" for share in _SHOWN]
        rows = [("group", "kind", "units", "ms", *heads, "by MACs since")]
        for curve in self.curves:
            if curve.counts:
                saved = curve.saved()
                cells = [f"-{1e3 * saved[round(share * curve.size)]:.3f}" for share in _SHOWN]
                rows.append(
                    (curve.name, curve.kind, str(curve.size), f"{1e3 * curve.seconds[0]:.3f}", *cells, curve.why)
                )
            else:
                rows.append((curve.name, curve.kind, str(curve.size), *[""] * (1 + len(heads)), curve.why))
        return f"{self}\n\n{columns(rows)}"

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> LatencyTable:
        """The table that `to_dict` gave.

        Raises:
            AttributeError, LookupError, TypeError: it is another dictionary.
        """
        names = {field.name for field in fields(LatencyCurve)}
        curves = [
            LatencyCurve(**{name: _tupled(value) for name, value in curve.items() if name in names})
            for curve in found["curves"]
        ]
        return cls(**{**found, "curves": tuple(curves), "providers": tuple(found["providers"])})


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _rising(values: Seconds) -> Seconds:
    """The nearest values, by squares, that never fall (pools of neighbours), and start at 0."""
    pools: list[tuple[float, int]] = []
    for value in values.tolist():
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (high, many), (low, few) = pools[-2:]
            pools[-2:] = [((high * many + low * few) / (many + few), many + few)]
    found = np.repeat([value for value, _ in pools], [count for _, count in pools])
    levels: Seconds = np.maximum(found - found[0], 0.0)
    return levels
