"""Which channels must stay: a fixpoint over demand, groups of convolutions, constants and alignment."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from torch import fx

from fxprune.channels.coupling import Coupling, Reader
from fxprune.channels.ids import Mask, Vector

TINY = 0.05


def fast_multiple(channels: int, fine: bool = False) -> int:
    """The multiple to cut a convolution to: onnxruntime computes in blocks of 16 channels.

    Fewer than 16 save nothing, and their readers leave the blocked layout: they are cut only where `fine` asks for it.
    """
    if fine:
        return next((m for m in (16, 8, 4) if channels >= 2 * m), 1)
    return min(16, channels)


class Consistency:
    """What every choice of channels must keep: whole grids, equal groups of a convolution, something of every axis.

    Nodes outside of `reached` ask for nothing.

    Attributes:
        alive: by class.
        why: by class, what keeps it: the index of a reader, or one of the codes below.
        cost: by class, from 0 to 1; where a choice is left, the cheapest stay.
    """

    REPRESENTATIVE, BALANCED, NONEMPTY, ALIGNED = -2, -3, -4, -5

    def __init__(self, coupling: Coupling, reached: set[fx.Node]) -> None:
        self.coupling, self.classes = coupling, coupling.classes
        self.alive: Mask = self.classes.pinned.copy()
        self.why = np.full(self.classes.count, -1, dtype=np.int64)
        self.cost = np.zeros(self.classes.count)
        walks = list(coupling.walks.values())
        pairs = [
            (coupling.of(b.inputs), coupling.of(b.outputs)) for w in walks for b in w.balances if b.node in reached
        ]
        self.balances = list({(i.tobytes(), o.tobytes()): (i, o) for i, o in pairs}.values())
        read = {str(n.target) for n in reached if n.op == "get_attr"}
        self._vectors = [
            v for name, axes in coupling.parameters.items() for v in axes if v is not None and name in read
        ]
        self._vectors += [v for w in walks for v in w.nonempty]
        self.axes = _unique(coupling.of(v) for v in self._vectors)
        self._offsets = np.cumsum([0, *map(len, self.axes)])[:-1]
        self._joined = np.concatenate(self.axes) if self.axes else np.zeros(0, np.int64)
        self.align(1)

    def align(self, to: int | str) -> None:
        """From now on keep counts that are multiples of `to`; "auto" says which, as long as that does not spread."""
        self._multiples = self._fast() if to == "auto" else [(v, int(to)) for v in self.axes if int(to) > 1]
        self._aligned, self._spread = self._multiples, to != "auto"

    def settle(self, alive: Mask) -> Mask:
        """The least consistent set that holds `alive`."""
        self.alive, self._aligned = alive | self.classes.pinned, self._multiples
        while self.classes.close(self.alive) or self.balance() or self.fill() or self.round():
            pass
        return self.alive

    def balance(self) -> bool:
        """Keep dead channels until the groups of every convolution have equal counts."""
        changed = False
        for inputs, outputs in self.balances:
            group = self.alive[inputs].any(1) | self.alive[outputs].any(1)
            for columns in (inputs, outputs):
                alive = self.alive[columns]
                lacking = np.where(group, max(1, int(alive.sum(1).max())) - alive.sum(1), 0)
                if (lacking > 0).any():
                    self._keep(self._cheapest(columns, lacking), self.BALANCED)
                    changed = True
        return changed

    def fill(self) -> bool:
        """Keep one channel of every axis that would lose them all."""
        if not len(self._joined):
            return False
        empty = np.flatnonzero(~np.logical_or.reduceat(self.alive[self._joined], self._offsets))
        for k in empty[::-1]:
            if not self.alive[self.axes[k]].any():
                self._keep(self._cheapest(self.axes[k][None], np.ones(1, np.int64)), self.NONEMPTY)
        return len(empty) > 0

    def round(self) -> bool:
        """Keep dead channels until the counts are multiples that run fast, as far as there are any.

        Where that would make channels of other layers stay, in grids or groups, the count is left as it is.
        """
        changed = False
        for columns, step in list(self._aligned):
            count = int(self.alive[columns].sum())
            lacking = min(-count % step, len(columns) - count)
            if lacking:
                before = self.alive.copy(), self.why.copy()
                self._keep(self._cheapest(columns[None], np.array([lacking])), self.ALIGNED)
                while self.classes.close(self.alive) or self.balance():
                    pass
                if not self._spread and int(self.alive.sum() - before[0].sum()) > lacking:
                    self.alive, self.why = before
                    self._aligned = [item for item in self._aligned if item[0] is not columns]
                    continue
                changed = True
        return changed

    def _fast(self) -> list[tuple[Vector, int]]:
        """The multiples that the channels of convolutions should be of, as measured in onnxruntime.

        Counts of 4 cost as if rounded up to 16, so more dead channels gain nothing; around depthwise convolutions,
        where memory traffic decides, multiples of 16 ran 1.24 times faster than those of 4 (MobileNetV2). That is asked
        for where a vector overlaps with no other, so that rounding does not spread.
        """
        convolutions = [([self.coupling.of(v) for v in own], deep) for own, deep in self.coupling.walks["eval"].aligned]
        depthwise = {v.tobytes() for own, deep in convolutions if deep for v in own}
        near = {v.tobytes() for own, _ in convolutions if any(v.tobytes() in depthwise for v in own) for v in own}
        vectors = _unique(v for own, _ in convolutions for v in own)
        holders = np.zeros(self.classes.count, np.int64)
        for classes in {tuple(np.sort(v)) for v in vectors}:
            np.add.at(holders, list(classes), 1)
        holders[np.concatenate([self.classes.whole, self.classes.left, self.classes.right])] = 2
        wide = [v.tobytes() in near and (holders[v] == 1).all() for v in vectors]
        return [(v, max(4, fast_multiple(len(v), True)) if w else 4) for v, w in zip(vectors, wide, strict=True)]

    def _cheapest(self, columns: Vector, lacking: NDArray[np.int64]) -> Vector:
        """For each row of classes, as many dead ones as it lacks, the cheapest first."""
        order = np.argsort(self.cost[columns] + self.alive[columns] * 2, axis=1, kind="stable")
        rank = np.arange(columns.shape[1])
        return np.take_along_axis(columns, order, 1)[rank < lacking[:, None]]

    def _keep(self, classes: Vector, why: int) -> None:
        self.why[classes[~self.alive[classes]]] = why
        self.alive[classes] = True


class Liveness(Consistency):
    """Starts from the pinned classes and adds what must stay, until nothing changes."""

    def __init__(self, coupling: Coupling, align: int | str, reached: set[fx.Node]) -> None:
        super().__init__(coupling, reached)
        self.readers = [r for r in coupling.walks["eval"].readers if r.node in reached]
        self._rows = [None if r.rows is None else coupling.of(r.rows) for r in self.readers]
        self._columns = [coupling.of(r.columns) for r in self.readers]
        self._done = [np.zeros(1 if r is None else r.shape, bool) for r in self._rows]
        for reader, rows in zip(self.readers, self._rows, strict=True):
            if rows is not None and reader.soft is not None:
                self.cost[rows[(reader.used & ~reader.soft[:, None]).any(-1)]] = 1
        self.align(align)
        self.demand()
        while self.represent() or self.balance() or self.fill() or self.round():
            self.demand()

    def demand(self) -> None:
        """Keep the columns that rows still alive read, and close grids, until stable."""
        changed = True
        while changed:
            changed = False
            self.classes.close(self.alive)
            for i in range(len(self.readers) - 1, -1, -1):
                reader, rows, columns = self.readers[i], self._rows[i], self._columns[i]
                new = ~self._done[i] if rows is None else self.alive[rows] & ~self._done[i]
                if not new.any():
                    continue
                self._done[i] |= new
                if rows is None:
                    need = reader.used.any(1)
                elif len(rows) == 1:
                    need = reader.used[0][new[0]].any(0)[None]
                else:
                    need = (reader.used & new[:, :, None]).any(1)
                if reader.soft is not None:
                    need = need & ~reader.soft
                fresh = columns[need]
                fresh = fresh[~self.alive[fresh]]
                if len(fresh):
                    self._keep(fresh, i)
                    changed = True

    def represent(self) -> bool:
        """Keep a representative for constants that merge, as few as serve all readers (greedy set cover)."""
        sets: list[Vector] = []
        for i, reader in enumerate(self.readers):
            if reader.merges is None or reader.constant is None or not reader.merges.any():
                continue
            rows, columns = self._rows[i], self._columns[i]
            assert rows is not None
            gone = reader.merges & ~self.alive[columns]
            for g in np.flatnonzero(gone.any(1)):
                read = reader.used[g][self.alive[rows[g]]].any(0)
                if (gone[g] & read).any() and representative(reader, int(g), self.alive[columns[g]]) is None:
                    size = np.where(reader.merges[g], np.abs(np.nan_to_num(reader.constant[g])), 0)
                    sets.append(np.unique(columns[g][size >= TINY * size[gone[g] & read].max()]))
        single = [s for s in sets if len(s) == 1]
        if single:
            self._keep(np.concatenate(single), self.REPRESENTATIVE)
            return True
        while sets:
            joined = np.concatenate(sets)
            best = np.bincount(joined).argmax()
            self._keep(np.array([best]), self.REPRESENTATIVE)
            sets = [s for s in sets if best not in s]
            if not sets:
                return True
        return False


def representative(reader: Reader, group: int, alive: Mask) -> int | None:
    """The alive column of a group that the merging constants can be expressed by: the largest one."""
    if reader.merges is None or reader.constant is None:
        return None
    size = np.where(reader.merges[group], np.abs(np.nan_to_num(reader.constant[group])), 0.0)
    best = int(np.argmax(np.where(alive, size, 0.0)))
    return best if alive[best] and size[best] > 0 and size[best] >= 1e-3 * size.max() else None


def _unique(vectors: Iterable[Vector]) -> list[Vector]:
    return list({v.tobytes(): v for v in vectors if len(v)}.values())
