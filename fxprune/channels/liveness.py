"""Which channels must stay: the smallest set that meets every constraint."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import fx

from fxprune.channels.alignment import distinct, fast_counts
from fxprune.channels.constraints import (
    CellsOfProjections,
    Demand,
    EqualGroups,
    Grids,
    Multiples,
    NonEmptyAxes,
    Representatives,
    costs_of_readers,
)
from fxprune.channels.coupling import Coupling
from fxprune.channels.dependence import fixed_nodes, useful_nodes
from fxprune.channels.ids import Mask, Vector
from fxprune.channels.reasons import Pinned, Reason, Structural
from fxprune.channels.solver import Constraint, Costs, State
from fxprune.channels.walk import Walk


@dataclass(frozen=True)
class Consistency:
    """What every choice of channels keeps, whatever reads them: whole grids, equal groups, something of every axis.

    Attributes:
        coupling: the relations of the channels.
        balances: by grouped convolution the classes of its inputs [groups, n] and outputs [groups, m].
        equal: by recurrent call the classes of the units of its layers and directions [rows, n]; what else is to be
            alike.
        axes: the distinct class vectors of axes of which something must stay.
        grids, last: the constraints, those to meet first and those to meet after all others.
    """

    coupling: Coupling
    balances: list[tuple[Vector, Vector]]
    equal: list[Vector]
    axes: list[Vector]
    grids: Grids
    groups: EqualGroups
    layers: EqualGroups
    projections: CellsOfProjections
    nonempty: NonEmptyAxes
    counts: Multiples

    @classmethod
    def of(
        cls,
        coupling: Coupling,
        reached: set[fx.Node],
        align: int | str = 1,
        decided: Collection[tuple[str, int]] = (),
        alike: Sequence[Vector] = (),
    ) -> Consistency:
        """From a coupling; nodes that are not reached ask for nothing.

        Args:
            coupling: the relations of the channels.
            reached: the nodes that stay in the graphs.
            align: counts are kept at multiples of it; "auto" says which run fast, as long as that does not spread.
            decided: axes of parameters whose counts "auto" leaves alone.
            alike: classes [rows, n] of which each row keeps equally many besides.
        """
        walks, classes = list(coupling.walks.values()), coupling.classes
        pairs = [
            (coupling.of(b.inputs), coupling.of(b.outputs)) for w in walks for b in w.balances if b.node in reached
        ]
        pairs += [(coupling.of(ids), coupling.of(ids)) for w in walks for ids in w.equal_groups]
        balances = list({(i.shape, i.tobytes(), o.tobytes()): (i, o) for i, o in pairs}.values())
        rows = [coupling.of(e.rows) for w in walks for e in w.equal if e.node in reached]
        equal = list({(r.shape, r.tobytes()): r for r in [*rows, *alike]}.values())
        more = [(coupling.of(e.cells), coupling.of(e.units)) for w in walks for e in w.more if e.node in reached]
        vectors = [v for name in _as_used(walks, reached) for v in coupling.parameters.get(name, ()) if v is not None]
        vectors += [v for w in walks for v in w.nonempty]
        axes = distinct([coupling.of(v) for v in vectors])
        grids, groups = Grids(classes), EqualGroups(balances, classes.count)
        layers = EqualGroups([(rows, rows) for rows in equal], classes.count, Structural.SAME_UNITS)
        projections, nonempty = CellsOfProjections(more, classes.count), NonEmptyAxes(axes, classes.count)
        counts = Multiples([], (grids, groups, layers, projections), True, classes.count)
        return cls(coupling, balances, equal, axes, grids, groups, layers, projections, nonempty, counts).aligned(
            align, decided
        )

    def aligned(self, to: int | str, decided: Collection[tuple[str, int]] = ()) -> Consistency:
        """The same with counts that are multiples of `to`, or fast ones ("auto") where they are not decided."""
        auto = to == "auto"
        counts = fast_counts(self.coupling, decided) if auto else [(v, int(to)) for v in self.axes if int(to) > 1]
        followers = self.grids, self.groups, self.layers, self.projections
        return replace(self, counts=Multiples(counts, followers, not auto, self.coupling.classes.count))

    @property
    def last(self) -> tuple[Constraint, ...]:
        """The constraints to meet after all others."""
        return self.projections, self.groups, self.layers, self.nonempty, self.counts

    def settle(self, alive: Mask, costs: Costs | None = None) -> Mask:
        """The smallest consistent set that holds `alive` and what is pinned.

        Args:
            alive: by class.
            costs: by class, from 0 to 1; where a choice is left, the cheapest stay.
        """
        costs = np.zeros(len(alive)) if costs is None else costs
        state = State(alive | self.coupling.classes.pinned, costs)
        state.settle([self.grids, *self.last])
        return state.alive


def _as_used(walks: Sequence[Walk], reached: set[fx.Node]) -> list[str]:
    """The parameters and buffers that stay, in the order in which layers take them, wherever their reads stand."""
    first: dict[str, tuple[int, int]] = {}
    for number, walk in enumerate(walks):
        places = {node: place for place, node in enumerate(walk.graph.nodes)}
        for node in walk.graph.find_nodes(op="get_attr"):
            if node in reached and node.users:
                place = number, min(places[user] for user in node.users)
                first[node.target] = min(first.get(node.target, place), place)
    return sorted(first, key=first.__getitem__)


class Liveness:
    """Which classes must stay, from those that are pinned and what readers ask for.

    Args:
        coupling: with facts of the eval graph.
        align, decided: as for `Consistency.of`.
        reached: the nodes that stay in the graphs.

    Attributes:
        readers: the contractions of the eval graph that stay.
        alive: by class.
        needed: by class, whether what the graph returns depends on it; the others that are alive are dead, and stay for
            what the operators ask of sizes, or because such ones read them.
        fixed: nodes that give the same for every input.
    """

    def __init__(
        self,
        coupling: Coupling,
        align: int | str,
        reached: set[fx.Node],
        decided: Collection[tuple[str, int]] = (),
    ) -> None:
        self._classes = coupling.classes
        count = self._classes.count
        whole = Consistency.of(coupling, reached, align, decided)
        self.readers = [r for r in coupling.walks["eval"].readers if r.node in reached]
        rows = [None if r.rows is None else coupling.of(r.rows) for r in self.readers]
        columns = [coupling.of(r.columns) for r in self.readers]
        demand = Demand(self.readers, rows, columns, count)
        representatives = Representatives(self.readers, rows, columns, count)
        costs = costs_of_readers(self.readers, rows, count)
        units = np.zeros(count, bool)
        for rows_of_units in whole.equal:
            units[rows_of_units] = True
        costs[units] = 1 - costs[units]  # of those kept for their number the ones with weights: masks hide the others
        self.fixed = fixed_nodes(coupling.walks["eval"], coupling.of) & reached
        useful = useful_nodes(coupling.walks["eval"], reached, self.fixed)
        pinned = self._classes.pinned
        needing = self._classes.pinned_by(lambda by: by is None or by in useful)
        read = [i for i, reader in enumerate(self.readers) if reader.node in useful]
        self._state = State(pinned, costs, units)
        if len(read) == len(self.readers) and np.array_equal(needing, pinned):
            self.needed = self._needed(self._state, whole.grids, demand)
        else:
            some = Demand([self.readers[i] for i in read], [rows[i] for i in read], [columns[i] for i in read], count)
            self.needed = self._needed(State(needing, costs, units), whole.grids, some)
        self._state.settle([whole.grids, demand, representatives, *whole.last])
        self.alive: Mask = self._state.alive

    def _needed(self, state: State, grids: Grids, demand: Demand) -> Mask:
        """What the readers of a demand need, and what is alive at first: positions that complete grids as well."""
        factors = Grids(self._classes, complete=False)
        state.settle([factors, demand])
        while state.keep(self._read_by_factors(state, demand.spared(state.alive)), Structural.GRID):
            state.settle([factors, demand])
        needed = state.alive.copy()
        state.settle([grids, demand])
        found: Mask = state.alive & (needed | ~state.kept_for(Structural.GRID) | self._classes.pinned)
        return found

    def _read_by_factors(self, state: State, spared: Vector) -> Vector:
        """Positions of grids that are needed since their factors are.

        Heads by channels are needed for these factors: keys are met by channel, values read by head; but for the pairs
        that no product has a use for. Where factors are there for positions alone, or, as groups of a shuffle, whatever
        reads them, a position counts for itself.

        Args:
            state: where factors do not make a position needed.
            spared: such pairs, as left * classes + right.
        """
        whole, left, right = self._classes.whole, self._classes.left, self._classes.right
        alive, pinned, count = state.alive, self._classes.pinned, self._classes.count
        by_grid = state.kept_for(Structural.GRID) & ~pinned
        read = alive[whole]  # positions whose factors, as a pair, somebody reads
        pairs = [(left[read], right[read])]
        order = np.argsort(whole, kind="stable")
        for side in ("left", "right"):  # heads that share keys and values are such positions themselves
            place = np.searchsorted(whole[order], left[read], side=side) - (side == "right")
            at = order[np.clip(place, 0, len(order) - 1)] if len(order) else order
            inner = whole[at] == left[read]
            pairs += [(factor[at[inner]], right[read][inner]) for factor in (left, right)]
            pairs += [(left[at[inner]], right[at[inner]])]
        keys = [one * count + other for pair in pairs for one, other in (pair, pair[::-1])]  # a shuffle exchanges them
        asked = alive[left] & alive[right] & ~(by_grid[left] & by_grid[right])
        nested = np.isin(left, whole) | np.isin(right, whole)
        asked &= nested | ~((pinned[left] & by_grid[right]) | (by_grid[left] & pinned[right]))
        asked &= ~np.isin(left * count + right, spared)
        found: Vector = whole[asked | np.isin(left * count + right, np.concatenate(keys))]
        return found

    def why(self, index: int) -> Reason:
        """Why a class that is alive stays."""
        reason = int(self._classes.reason[index])
        if reason < len(self._classes.reasons):
            return Pinned(self._classes.reasons[reason])
        return self._state.why(index)
