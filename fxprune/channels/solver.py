"""The smallest set of channels that meets a list of constraints, found from below.

A constraint is a family of demands of one kind, each on a few classes of channels. Starting from what is alive, the
constraints are met in the order of the list, from its head again as soon as one of them kept something, until none
does. A demand is looked at again only when a class that it watches was kept since: the work grows with what changes.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fxprune.channels.ids import Mask, Vector
from fxprune.channels.reasons import ReadBy, Reason, Structural
from fxprune.channels.relation import Relation

Costs = NDArray[np.float64]

# what is kept for these reasons, and read by nobody, need not compute what it did
_FOR_NUMBERS = (Structural.SAME_UNITS, Structural.NONEMPTY)


class Constraint(ABC):
    """A family of numbered demands.

    A demand must hold while all classes that it watches are alive, and may turn only when one of them is kept.

    Attributes:
        watched: from a demand to the classes that it watches.
    """

    def __init__(self, watched: Relation) -> None:
        self.watched = watched

    @cached_property
    def watching(self) -> Relation:
        """From a class to the demands that watch it."""
        return self.watched.inverse()

    @abstractmethod
    def meet(self, state: State) -> bool:
        """Keep what the demands that are not met ask for; whether anything was kept."""


class State:
    """What is kept so far, and why; `may_idle` says which classes may be kept without what they read.

    Attributes:
        alive: by class.
        idle: by class, whether it is kept for its number alone: nothing reads it, so that what it reads may go.
        kept: the number of classes kept since the start.
    """

    def __init__(self, alive: Mask, cost: Costs, may_idle: Mask | None = None) -> None:
        self.alive: Mask = alive.copy()
        self.idle: Mask = np.zeros(len(alive), bool)
        self._may_idle = self.idle.copy() if may_idle is None else may_idle
        self.kept = 0
        self._cost = cost
        self._dead = np.flatnonzero(~alive)
        self._journal: list[Vector] = []
        self._woken: list[Vector] = []  # by entry of the journal, the classes that were idle before
        self._agendas: dict[Constraint, Agenda] = {}
        self._reasons: list[Reason] = [Structural.GRID]
        self._code: dict[Reason, int] = {Structural.GRID: 0}
        self._why = np.zeros(len(alive), np.int64)

    def settle(self, constraints: Sequence[Constraint]) -> None:
        """Meet the constraints, earlier ones first, until all of them hold."""
        while any(constraint.meet(self) for constraint in constraints):
            pass

    def keep(self, classes: Vector, reason: Reason) -> bool:
        """Keep classes; whether any of them was dead, or idle and is read now."""
        fresh = np.unique(classes[~self.alive[classes]])
        woken = np.unique(classes[self.idle[classes]]) if isinstance(reason, ReadBy) else fresh[:0]
        if not len(fresh) and not len(woken):
            return False
        self.alive[fresh] = True
        self.idle[fresh] = self._may_idle[fresh] & (reason in _FOR_NUMBERS)
        self.idle[woken] = False
        changed = np.concatenate([fresh, woken])
        if reason not in self._code:
            self._code[reason] = len(self._reasons)
            self._reasons.append(reason)
        self._why[changed] = self._code[reason]
        self._journal.append(changed)
        self._woken.append(woken)
        self.kept += len(fresh)
        return True

    def asks(self, classes: Vector) -> Mask:
        """Which of these classes are alive, and have a say in what they read."""
        found: Mask = self.alive[classes] & ~self.idle[classes]
        return found

    def why(self, index: int) -> Reason:
        """What a class was kept for."""
        return self._reasons[int(self._why[index])]

    def kept_for(self, reason: Reason) -> Mask:
        """Which classes were kept for a reason."""
        found: Mask = self._why == self._code.get(reason, -1)
        return found

    def cheapest(self, rows: Vector, lacking: Vector) -> Vector:
        """For each row of classes, as many dead ones as it lacks, the cheapest first and then by position."""
        order = np.argsort(self._cost[rows] + self.alive[rows] * 2, axis=1, kind="stable")
        rank = np.arange(rows.shape[1])
        found: Vector = np.take_along_axis(rows, order, 1)[rank < lacking[:, None]]
        return found

    def mark(self) -> int:
        """The moment, for `undo`."""
        return len(self._journal)

    def undo(self, mark: int) -> None:
        """Take back what was kept since a moment at which every other constraint held."""
        while len(self._journal) > mark:
            woken = self._woken.pop()
            fresh = self._journal.pop()
            fresh = fresh[: len(fresh) - len(woken)]
            self.alive[fresh] = self.idle[fresh] = False
            self.idle[woken] = True
            self.kept -= len(fresh)
        for agenda in self._agendas.values():
            agenda.seen = min(agenda.seen, mark)

    def agenda(self, constraint: Constraint) -> Agenda:
        """The demands of a constraint that are to be looked at."""
        if constraint not in self._agendas:
            self._agendas[constraint] = Agenda(constraint, self._journal, self._first(constraint))
        return self._agendas[constraint]

    def _first(self, constraint: Constraint) -> Vector:
        """The demands that watch a class which was dead at the start."""
        if len(self._dead) * 16 < len(self.alive):
            return np.unique(constraint.watching.of(self._dead))
        dead = np.zeros(len(self.alive), bool)
        dead[self._dead] = True
        return np.flatnonzero(constraint.watched.any(dead))


class Agenda:
    """The demands of one constraint that may not hold, since classes that they watch were dead at first or are new."""

    def __init__(self, constraint: Constraint, journal: Sequence[Vector], first: Vector) -> None:
        self.seen = 0
        self._constraint, self._journal, self._waiting = constraint, journal, first
        self._dropped: set[int] = set()

    def take(self) -> Vector:
        """All of them, ascending; they count as looked at."""
        waiting, self._waiting = self._waiting, self._waiting[:0]
        if self.seen == len(self._journal):
            return waiting
        fresh = np.concatenate(self._journal[self.seen :])
        self.seen = len(self._journal)
        return np.unique(np.concatenate([waiting, self._constraint.watching.of(fresh)]))

    def put_back(self, demands: Vector) -> None:
        """Look at these again next time."""
        self._waiting = np.union1d(self._waiting, demands)

    def drop(self, demand: int) -> None:
        """Never look at it again."""
        self._dropped.add(demand)

    def sweep(self) -> Iterator[int]:
        """One after the other, ascending; those that turn up behind the present one wait for the next sweep."""
        queue: list[int] = self.take().tolist()
        queued, behind = set(queue), set[int]()
        while queue:
            demand = heapq.heappop(queue)
            queued.discard(demand)
            if demand in self._dropped:
                continue
            yield demand
            for other in self.take().tolist():
                if other <= demand:
                    behind.add(other)
                elif other not in queued:
                    queued.add(other)
                    heapq.heappush(queue, other)
        if behind:
            self.put_back(np.array(sorted(behind)))
