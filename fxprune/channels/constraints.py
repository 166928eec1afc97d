"""What every choice of channels must keep, a class each: grids, readers, constants, groups, axes and fast counts."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from fxprune.channels.ids import Classes, Mask, Vector
from fxprune.channels.readers import BORDERED, MULTIPLIED, UNFOLDED, Reader
from fxprune.channels.reasons import ReadBy, Structural
from fxprune.channels.relation import Relation
from fxprune.channels.solver import Constraint, Costs, State

SIZEABLE = 0.05  # share of the largest constant that a representative should have
LEAST = 1e-3  # and must have: its column becomes the sum of the others', scaled by their ratio


class Grids(Constraint):
    """A position of a grid is alive exactly where both its factors are.

    Args:
        classes: with the grids.
        complete: whether a position is kept where both its factors are, or only factors of positions.
    """

    def __init__(self, classes: Classes, *, complete: bool = True) -> None:
        self._whole, self._left, self._right = classes.whole, classes.left, classes.right
        self._completes = complete
        triples = np.stack([self._whole, self._left, self._right], axis=1)
        super().__init__(
            Relation(np.repeat(np.arange(len(triples)), 3), triples.reshape(-1), len(triples), classes.count)
        )

    def meet(self, state: State) -> bool:
        agenda, changed = state.agenda(self), False
        while len(at := agenda.take()):
            whole, left, right = self._whole[at], self._left[at], self._right[at]
            needed = state.alive[whole]
            complete = state.alive[left] & state.alive[right] & self._completes
            fresh = np.concatenate([left[needed], right[needed], whole[complete]])
            changed |= state.keep(fresh, Structural.GRID)
        return changed


class Demand(Constraint):
    """Columns stay that rows still alive read, unless they are constants which fold or merge; for one solution only.

    Readers come last first, so that one sweep carries a demand back through a whole chain.

    Args:
        readers: the contractions.
        rows, columns: their classes, rows None where everything is always read.
    """

    def __init__(
        self, readers: Sequence[Reader], rows: Sequence[Vector | None], columns: Sequence[Vector], classes: int
    ) -> None:
        self._readers, self._rows, self._columns, self._count = readers[::-1], rows[::-1], columns[::-1], classes
        self._met = [np.zeros(1 if r is None else r.shape, bool) for r in self._rows]
        super().__init__(
            Relation.of_sets([_watched(r, c) for r, c in zip(self._rows, self._columns, strict=True)], classes)
        )

    def meet(self, state: State) -> bool:
        changed = False
        for index in state.agenda(self).sweep():
            needed = self._needed(index, state)
            if needed is None:
                continue
            reader, columns = self._readers[index], self._columns[index]
            if reader.constant is not None:
                known = ~np.isnan(reader.constant)
                changed |= state.keep(columns[needed & known], ReadBy(reader.node, UNFOLDED))
            if reader.mapped is not None and reader.maps is None:
                changed |= state.keep(columns[needed & reader.mapped], ReadBy(reader.node, BORDERED))
            changed |= state.keep(columns[needed], ReadBy(reader.node, reader.why))
        return changed

    def spared(self, alive: Mask) -> Vector:
        """Pairs that products of activations have no use for, as row * classes + column: one factor is zero there.

        Rows are heads that are alive or not. None are given of columns, or heads, that others read as well.
        """
        spared, asked, read = [[np.zeros(0, np.int64)] for _ in range(3)]
        for reader, rows, columns in zip(self._readers, self._rows, self._columns, strict=True):
            if rows is None or reader.why != MULTIPLIED:
                read.append(columns.reshape(-1))
                continue
            pairs, used = rows.T * self._count + columns, reader.used.of_group(0) & alive[rows.T]
            spared.append(pairs[~used])
            asked.append(pairs[used])
        found = np.setdiff1d(np.concatenate(spared), np.concatenate(asked))
        elsewhere = np.concatenate(read)
        return found[~np.isin(found // self._count, elsewhere) & ~np.isin(found % self._count, elsewhere)]

    def _needed(self, index: int, state: State) -> Mask | None:
        """[groups, columns], what the rows that ask since the last time read; None without such rows."""
        reader, rows, met = self._readers[index], self._rows[index], self._met[index]
        fresh = ~met if rows is None else state.asks(rows) & ~met
        if not fresh.any():
            return None
        met |= fresh
        needed = reader.used.columns_of_rows(None if rows is None else fresh)
        return needed if reader.soft is None else needed & ~reader.soft


class Representatives(Constraint):
    """Where constants merge, one column is alive that they can be expressed by: as few as serve all readers.

    A demand is one group of a reader. Those that a single column can serve are met first, the others by greedy set
    cover: the column that serves most of them next, the first of equals.
    """

    def __init__(
        self, readers: Sequence[Reader], rows: Sequence[Vector | None], columns: Sequence[Vector], classes: int
    ) -> None:
        self._demands = [
            (reader, group, r[group], c[group])
            for reader, r, c in zip(readers, rows, columns, strict=True)
            if r is not None and reader.merges is not None and reader.constant is not None
            for group in np.flatnonzero(reader.merges.any(1)).tolist()
        ]
        super().__init__(Relation.of_sets([_watched(rows, columns) for _, _, rows, columns in self._demands], classes))

    def meet(self, state: State) -> bool:
        agenda = state.agenda(self)
        open_demands = agenda.take()
        choices = [self._choices(index, state.alive) for index in open_demands.tolist()]
        unmet = [i for i, choice in enumerate(choices) if choice is not None]
        if not unmet:
            return False
        agenda.put_back(open_demands[unmet])
        sets = [choice for choice in choices if choice is not None]
        single = [s for s in sets if len(s) == 1]
        chosen = np.concatenate(single) if single else greedy_cover(sets)
        return state.keep(chosen, Structural.REPRESENTATIVE)

    def _choices(self, index: int, alive: Mask) -> Vector | None:
        """The classes that could stand for the others, None where nothing is to be done."""
        reader, group, rows, columns = self._demands[index]
        assert reader.merges is not None
        gone = reader.merges[group] & ~alive[columns]
        if not gone.any():
            return None
        merging = gone & reader.used.columns_of(group, alive[rows])
        if not merging.any() or representative(reader, group, alive[columns]) is not None:
            return None
        size = _sizes(reader, group)
        return np.unique(columns[size >= SIZEABLE * size[merging].max()])


class EqualGroups(Constraint):
    """The groups of every convolution that are left have equally many inputs, and equally many outputs.

    Args:
        pairs: by convolution the classes of its inputs [groups, n] and outputs [groups, m].
        reason: why channels are kept for that.
    """

    def __init__(
        self, pairs: Sequence[tuple[Vector, Vector]], classes: int, reason: Structural = Structural.BALANCED
    ) -> None:
        self._pairs, self._reason = pairs, reason
        super().__init__(Relation.of_sets([_watched(inputs, outputs) for inputs, outputs in pairs], classes))

    def meet(self, state: State) -> bool:
        changed = False
        for index in state.agenda(self).sweep():
            inputs, outputs = self._pairs[index]
            there = state.alive[inputs].any(1) | state.alive[outputs].any(1)
            for side in (inputs, outputs):
                counts = state.alive[side].sum(1)
                lacking = np.where(there, max(1, int(counts.max())) - counts, 0)
                if (lacking > 0).any():
                    changed |= state.keep(state.cheapest(side, lacking), self._reason)
        return changed


class CellsOfProjections(Constraint):
    """Recurrent layers with a projection have more cells than projected units: else torch takes them for plain ones.

    Args:
        pairs: by layer the classes of its cells and of its projected units.
    """

    def __init__(self, pairs: Sequence[tuple[Vector, Vector]], classes: int) -> None:
        self._pairs = pairs
        super().__init__(Relation.of_sets([np.concatenate(pair) for pair in pairs], classes))

    def meet(self, state: State) -> bool:
        changed = False
        for index in state.agenda(self).sweep():
            cells, units = self._pairs[index]
            lacking = int(state.alive[units].sum()) + 1 - int(state.alive[cells].sum())
            if lacking > 0:
                changed |= state.keep(state.cheapest(cells[None], np.array([lacking])), Structural.MORE_CELLS)
        return changed


class NonEmptyAxes(Constraint):
    """Every axis keeps something; the last ones first, an axis at a time: what one keeps reads may fill others."""

    def __init__(self, axes: Sequence[Vector], classes: int) -> None:
        self._axes = axes[::-1]
        super().__init__(Relation.of_sets(self._axes, classes))

    def meet(self, state: State) -> bool:
        agenda = state.agenda(self)
        at = agenda.take()
        empty = at[~self.watched.any(state.alive, at)]
        if not len(empty):
            return False
        agenda.put_back(empty[1:])
        return state.keep(state.cheapest(self._axes[empty[0]][None], np.ones(1, np.int64)), Structural.NONEMPTY)


class Multiples(Constraint):
    """Counts are multiples of what runs fast, as far as there are dead channels to keep. To be met last.

    Args:
        counts: class vectors and the multiples.
        followers: what rounding sets off. Where that keeps channels of other layers, in grids or groups, the count is
            left as it is, unless `spread`.
    """

    def __init__(
        self, counts: Sequence[tuple[Vector, int]], followers: Sequence[Constraint], spread: bool, classes: int
    ) -> None:
        self._counts, self._followers, self._spread = counts, followers, spread
        super().__init__(Relation.of_sets([columns for columns, _ in counts], classes))

    def meet(self, state: State) -> bool:
        changed, agenda = False, state.agenda(self)
        for index in agenda.sweep():
            columns, multiple = self._counts[index]
            count = int(state.alive[columns].sum())
            lacking = min(-count % multiple, len(columns) - count)
            if not lacking:
                continue
            moment, kept = state.mark(), state.kept
            state.keep(state.cheapest(columns[None], np.array([lacking])), Structural.ALIGNED)
            state.settle(self._followers)
            if not self._spread and state.kept - kept > lacking:
                state.undo(moment)
                agenda.drop(index)
            else:
                changed = True
        return changed


def representative(reader: Reader, group: int, alive: Mask) -> int | None:
    """The alive column of a group that the merging constants can be expressed by: the largest one."""
    if reader.merges is None or reader.constant is None:
        return None
    size = _sizes(reader, group)
    best = int(np.argmax(np.where(alive, size, 0.0)))
    return best if alive[best] and size[best] > 0 and size[best] >= LEAST * size.max() else None


def greedy_cover(sets: Sequence[Vector]) -> Vector:
    """Few items of which every set holds one: the item of most sets that have none yet, the smallest of equals.

    Example:
        >>> greedy_cover([np.array([0, 2]), np.array([1, 2]), np.array([3])])
        array([2, 3])
    """
    holds = Relation.of_sets(sets, int(max(s.max() for s in sets)) + 1)
    held_by = holds.inverse()
    left = held_by.counts.copy()  # by item, the sets without an item that hold it
    queue = [(-int(count), item) for item, count in enumerate(left.tolist()) if count]
    heapq.heapify(queue)
    served, chosen = np.zeros(len(sets), bool), []
    while queue:
        count, item = heapq.heappop(queue)
        if left[item] == 0:
            continue
        if -count != left[item]:
            heapq.heappush(queue, (-int(left[item]), item))
            continue
        chosen.append(item)
        fresh = held_by.row(item)
        fresh = fresh[~served[fresh]]
        served[fresh] = True
        np.subtract.at(left, holds.of(fresh), 1)
    return np.array(chosen, np.int64)


def costs_of_readers(readers: Sequence[Reader], rows: Sequence[Vector | None], classes: int) -> Costs:
    """By class 1 where keeping it would keep others that it reads, else 0."""
    costs = np.zeros(classes)
    for reader, own in zip(readers, rows, strict=True):
        if own is not None and reader.soft is not None:
            costs[own[reader.used.rows_with(~reader.soft)]] = 1
    return costs


def _watched(one: Vector | None, other: Vector) -> Vector:
    parts = [other.reshape(-1)] if one is None else [one.reshape(-1), other.reshape(-1)]
    return np.concatenate(parts)


def _sizes(reader: Reader, group: int) -> Costs:
    """By column the size of the constant that merges, 0 for the others."""
    assert reader.merges is not None
    assert reader.constant is not None
    sizes: Costs = np.where(reader.merges[group], np.abs(np.nan_to_num(reader.constant[group])), 0.0)
    return sizes
