"""Budgets of channels: which choice of units keeps one and uses it up, and what to say where none does."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fxprune.channels.budget import Staircase
from fxprune.channels.groups import Grouping
from fxprune.channels.ids import Mask, Vector
from fxprune.errors import ArgumentError, PruningError

SPENT = 0.98  # share of a budget that counts as all of it
MARGIN = 1.02  # another process measures a little more or less


@dataclass(frozen=True)
class Choice:
    """The units that go, and how many times faster the rest was measured to be (None: it was not)."""

    units: Vector
    speedup: float | None = None


class Budget(abc.ABC):
    """A limit on what is left. Candidates are tried in order: by rounding, then by whether MACs count as timed.

    Attributes:
        roundings: how the channels of convolutions are rounded where the caller leaves it open: whole blocks run
            fastest; a budget that they cannot keep is cut finer.
        timed: whether groups whose MACs take long end a multiple lower, those whose take little one higher.
    """

    roundings: ClassVar[Sequence[int | str]] = ("auto", "fine", 1)
    timed: ClassVar[Sequence[bool]] = (False,)

    @abc.abstractmethod
    def fit(self, candidates: Iterator[Staircase]) -> Choice | None:
        """The choice of the candidates of one rounding, None where none of them keeps the budget."""

    @abc.abstractmethod
    def refusal(self) -> PruningError:
        """What to raise when no candidate that was tried kept the budget."""


class Amount(Budget):
    """So many of the units: a fraction (float) or a count (int)."""

    roundings: ClassVar[Sequence[int | str]] = ("fine",)

    def __init__(self, value: float) -> None:
        self.value = value

    def fit(self, candidates: Iterator[Staircase]) -> Choice | None:
        stairs = next(candidates)
        if self.value > stairs.total:
            raise ArgumentError(f"amount={self.value}: there are {stairs.total} units that may be pruned.")
        if self.value and not len(stairs):
            return None
        wanted = self.value * stairs.total if isinstance(self.value, float) else self.value
        return Choice(stairs.units(stairs.count(wanted)))

    def refusal(self) -> PruningError:
        return PruningError(f"amount={self.value} cannot be reached: max_per_group and at_least leave nothing to mask.")


class Size(Budget):
    """MACs or parameters that may be left: a fraction of the dense model's (float) or a count (int).

    Args:
        grouping: of the module.
        alive: from a choice of units to the classes that are left.
        name: "macs" or "parameters".
        value: what may be left.
    """

    def __init__(self, grouping: Grouping, alive: Callable[[Vector], Mask], name: str, value: float) -> None:
        self.grouping, self.alive, self.name, self.value = grouping, alive, name, value
        self.dense = grouping.dense[("macs", "parameters").index(name)]
        # a hair more, so that a count's share gives the count
        self.limit = value * self.dense * (1 + 1e-12) if isinstance(value, float) else value
        self.least = self.dense

    def left(self, units: Vector) -> int:
        """What is left without the units."""
        count = self.grouping.macs if self.name == "macs" else self.grouping.parameters
        return count(self.alive(units))

    def fit(self, candidates: Iterator[Staircase]) -> Choice | None:
        """The fewest units within the budget, of the first candidate that uses it up, else of that which uses most."""
        best, found = -1, None
        for stairs in candidates:
            height = stairs.search(lambda units: self.left(units) <= self.limit)
            if height is None:
                self.least = self.left(stairs.units(len(stairs)))
                continue
            units = stairs.units(height)
            if self.left(units) < SPENT * self.limit:
                units = stairs.fill(height, self.left, self.limit)
            if (spent := self.left(units)) > best:
                best, found = spent, Choice(units)
            if best >= SPENT * self.limit:
                break
        return found

    def refusal(self) -> PruningError:
        stays = [group for group in self.grouping.groups if group.reason]
        stays.sort(key=lambda group: -getattr(group, self.name) * group.size)
        why = "; ".join(dict.fromkeys(f"{group.name!r}: {group.reason}" for group in stays[:3]))
        return PruningError(
            f"{self.name}={self.value} cannot be reached: at most {self.limit:,.0f} of {self.dense:,} were asked for, "
            f"the best is {self.least:,} ({self.least / max(self.dense, 1):.3f}). Raise it, or max_per_group, or cut "
            "finer (round_to=1, and align=1 in finalize). What must stay (`fxprune.channel_groups` has all): "
            f"{why or 'a unit of each'}."
        )


class Macs(Size):
    """`Size`, where what takes more time than its MACs tell goes first if the rounding leaves it open."""

    timed: ClassVar[Sequence[bool]] = (True, False)


class Speed(Budget):
    """How many times faster in onnxruntime.

    Args:
        grouping: of the module.
        alive: from a choice of units to the classes that are left.
        wanted: the factor, above 1.
        measure: from a choice of units to how many times faster the module then runs.
    """

    timed: ClassVar[Sequence[bool]] = (True,)

    def __init__(
        self,
        grouping: Grouping,
        alive: Callable[[Vector], Mask],
        wanted: float,
        measure: Callable[[Vector], float],
    ) -> None:
        self.grouping, self.alive, self.wanted, self.measure = grouping, alive, wanted, measure
        self.best = 0.0

    def fit(self, candidates: Iterator[Staircase]) -> Choice | None:
        """The fewest units, to 1/32 of the MACs, that were measured to be fast enough."""
        stairs = next(candidates)
        self.best = 0.0
        too_slow, fast_enough = 1.0, 0.0  # shares of the MACs
        share, found = 1 / self.wanted, None
        for _ in range(10):
            units, within = self._cut(stairs, share)
            reached = self.measure(units)
            self.best = max(self.best, reached)
            if reached >= self.wanted * MARGIN:
                found, fast_enough = Choice(units, reached), share
            elif not within:
                break
            else:
                too_slow = share
            if found is None:
                share *= min(0.95, reached / self.wanted)
                continue
            if too_slow - fast_enough < 1 / 32:
                break
            share = (too_slow + fast_enough) / 2
        return found

    def _cut(self, stairs: Staircase, share: float) -> tuple[Vector, bool]:
        """The fewest units that leave a share of the MACs, else all, and whether they do."""
        limit = share * self.grouping.dense[0]
        height = stairs.search(lambda units: self.grouping.macs(self.alive(units)) <= limit)
        return stairs.units(len(stairs) if height is None else height), height is not None

    def refusal(self) -> PruningError:
        return PruningError(
            f"speedup={self.wanted} cannot be reached: the best that was measured is {self.best:.2f}. No mask was "
            "inserted."
        )
