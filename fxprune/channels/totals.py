"""Sums that shrink with the channels that are left: multiply-accumulates, parameters, elements that are moved."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import fx

from fxprune.channels.costs import node_costs, node_traffic
from fxprune.channels.coupling import Coupling
from fxprune.channels.ids import Mask, Vector
from fxprune.channels.readers import Reader
from fxprune.channels.registry import Cost
from fxprune.channels.relation import Relation
from fxprune.channels.units import Balanced
from fxprune.channels.walk import Walk
from fxprune.graph.batch import Batch


@dataclass(frozen=True)
class Term:
    """One summand, in proportion to the shares of class vectors that are alive.

    Attributes:
        value: the summand of the whole model.
        vectors: the class vectors; their shares multiply.
        within: for a grouped convolution its classes by group: the shares are those within groups that are left.
    """

    value: float
    vectors: Sequence[Vector]
    within: Balanced | None = None


class Total:
    """A sum of terms.

    Args:
        terms: the summands.
        classes: the number of classes.

    Example:
        >>> total = Total([Term(12.0, [np.array([0, 1, 2, 3])])], 4)
        >>> total(np.array([True, True, True, False])), total.without(np.array([0, 1]))
        (9, 6)
    """

    def __init__(self, terms: Sequence[Term], classes: int) -> None:
        self._values = np.array([term.value for term in terms])
        numbers: dict[bytes, int] = {}
        vectors: list[Vector] = []
        factors: list[Vector] = []
        for term in terms:
            for vector in term.vectors:
                if numbers.setdefault(vector.tobytes(), len(vectors)) == len(vectors):
                    vectors.append(vector)
            factors.append(np.array([numbers[v.tobytes()] for v in term.vectors], np.int64))
        self._vectors = Relation.of_sets(vectors, classes)
        self._factors = Relation.of_sets(factors, len(vectors))
        self._holding, self._scaling = self._vectors.inverse(), self._factors.inverse()
        grouped = [(i, term.within) for i, term in enumerate(terms) if term.within is not None]
        self._grouped = np.array([i for i, _ in grouped], np.int64)
        self._groups = [np.concatenate(within, axis=1) for _, within in grouped]
        rows = [row for both in self._groups for row in both]
        self._rows = Relation.of_sets(rows, classes)
        self._rows_of = Relation.of_sets(_ranges([len(both) for both in self._groups]), len(rows))

    def __call__(self, alive: Mask) -> int:
        """What is left of it."""
        shares = np.ones(len(self._values))
        left = _share(self._vectors, alive)
        np.multiply.at(shares, self._factors.lefts, left[self._factors.rights])
        shares[self._grouped] /= np.maximum(_share(self._rows_of, self._rows.any(alive)), 1e-9)
        return round(float(self._values @ shares))

    def without(self, dead: Vector) -> int:
        """What is left of it when only these classes are gone; takes as long as they have to do with it."""
        shares = np.ones(len(self._values))
        alive = np.ones(len(self._holding), bool)
        alive[dead] = False
        for term in np.unique(self._scaling.of(self._holding.of(dead))).tolist():
            for vector in self._factors.row(term).tolist():
                own = alive[self._vectors.row(vector)]
                shares[term] *= own.sum() / len(own)
            at = int(np.searchsorted(self._grouped, term))
            if at < len(self._grouped) and self._grouped[at] == term:
                shares[term] /= max(alive[self._groups[at]].any(1).mean(), 1e-9)
        return round(float(self._values @ shares))


def contraction_totals(coupling: Coupling) -> tuple[Total, Total]:
    """Multiply-accumulates of the eval graph and elements that its convolutions and linear layers move, of a sample."""
    walk, of = coupling.walks["eval"], coupling.of
    readers = _only_readers(walk)
    costs: dict[object, Term] = {}
    traffic: list[Term] = []
    batch = Batch.of(walk.graph)
    for node in (n for n in walk.graph.nodes if n.op == "call_function"):
        for cost in node_costs(node, walk.env, batch):
            reader, within, ids = readers.get(node), None, cost.ids
            if reader is not None and reader.rows is not None and ids is not None:
                rows, columns = of(reader.rows), of(reader.columns)
                vectors = [rows.reshape(-1), columns.reshape(-1)]
                within = (columns, rows) if len(rows) > 1 else None
                if (moved := node_traffic(node, batch)) is not None:
                    sides = Term(moved.output, vectors[:1], None), Term(moved.data, vectors[1:], None)
                    traffic += [*sides, Term(moved.weight, vectors, within)]
                beside = Cost(cost.macs, (cost.axes or ())[:-2]).ids or ()  # axes that rows and columns are not
                vectors = [*vectors, *map(of, beside)]
            else:
                vectors = list(map(of, ids or ()))
            key = (0 if within is None else len(within[0]), *(v.tobytes() for v in vectors))
            before = costs[key].value if key in costs else 0.0
            costs[key] = Term(cost.macs + before, vectors, within)
    count = coupling.classes.count
    return Total(list(costs.values()), count), Total(traffic, count)


def _only_readers(walk: Walk) -> dict[fx.Node, Reader]:
    """The readers with rows by their calls, of those that have one."""
    found: dict[fx.Node, list[Reader]] = {}
    for reader in walk.readers:
        if reader.rows is not None:
            found.setdefault(reader.node, []).append(reader)
    return {node: readers[0] for node, readers in found.items() if len(readers) == 1}


def _share(sets: Relation, alive: Mask) -> NDArray[np.float64]:
    """By set, the share of its items that are alive; sets are not empty."""
    if not len(sets):
        return np.zeros(0)
    left: NDArray[np.float64] = np.add.reduceat(alive[sets.rights].astype(np.int64), sets.starts[:-1]) / sets.counts
    return left


def _ranges(lengths: Sequence[int]) -> list[Vector]:
    """Consecutive integers from 0 on, cut into parts."""
    return [np.arange(start, stop) for start, stop in itertools.pairwise(np.cumsum([0, *lengths]))]
