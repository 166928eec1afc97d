"""Which integers go with which, in arrays: the sets that hold an item, the items of a set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fxprune.channels.ids import Mask, Vector


class Relation:
    """Pairs of integers (left, right), grouped by left: `rights[starts[i] : starts[i + 1]]` go with left i.

    Pairs keep the order in which they were given within one left.

    Example:
        >>> holds = Relation.of_sets([np.array([0, 1]), np.array([1, 2])], 3)  # set 0 holds 0 and 1, set 1 the others
        >>> holds.of(np.array([1]))
        array([1, 2])
        >>> holds.inverse().of(np.array([1]))  # the sets that hold 1
        array([0, 1])
    """

    def __init__(self, left: Vector, right: Vector, lefts: int, rights: int) -> None:
        order = np.argsort(left, kind="stable")
        self.lefts: Vector = left[order]
        self.rights: Vector = right[order]
        self.counts: Vector = np.bincount(left, minlength=lefts).astype(np.int64)
        self.starts: Vector = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)
        self._sizes = lefts, rights

    @classmethod
    def of_sets(cls, sets: Sequence[Vector], items: int) -> Relation:
        """From the number of a set to the items that it holds; items are below `items`."""
        left = np.repeat(np.arange(len(sets)), [len(s) for s in sets])
        right = np.concatenate(sets) if len(sets) else np.zeros(0, np.int64)
        return cls(left, right, len(sets), items)

    def __len__(self) -> int:
        return self._sizes[0]

    def inverse(self) -> Relation:
        """The same pairs by right."""
        return Relation(self.rights, self.lefts, self._sizes[1], self._sizes[0])

    def join(self, left: Vector) -> tuple[Vector, Vector]:
        """Every pair whose left is one of these: the position in `left`, and the right."""
        count = self.counts[left]
        at = np.repeat(np.arange(len(left)), count)
        within = np.arange(len(at)) - np.repeat(np.cumsum(count) - count, count)
        return at, self.rights[self.starts[left][at] + within]

    def of(self, left: Vector) -> Vector:
        """What goes with these, one after the other."""
        return self.join(left)[1]

    def row(self, left: int) -> Vector:
        """What goes with one."""
        return self.rights[self.starts[left] : self.starts[left + 1]]

    def any(self, mask: Mask, left: Vector | None = None) -> Mask:
        """For each left, or for each of these, whether the mask is set for anything that goes with it."""
        counts, rights = (self.counts, self.rights) if left is None else (self.counts[left], self.of(left))
        found, some = np.zeros(len(counts), bool), counts > 0
        if some.any():
            found[some] = np.logical_or.reduceat(mask[rights], (np.cumsum(counts) - counts)[some])
        return found

    def signatures(self) -> Vector:
        """For each left a number; equal ones where the same rights go with it, in the same order, and 0 without any.

        Numbers ascend with the first left that has them.
        """
        found = np.zeros(len(self), np.int64)
        data, width = self.rights.tobytes(), self.rights.itemsize
        numbers: dict[bytes, int] = {}
        for left in np.flatnonzero(self.counts).tolist():
            key = data[width * self.starts[left] : width * self.starts[left + 1]]
            found[left] = numbers.setdefault(key, len(numbers) + 1)
        return found


def numbered(*columns: Vector | Mask) -> Vector:
    """For each index the number of its tuple among the distinct ones, in ascending order of the tuples.

    Example:
        >>> numbered(np.array([7, 5, 7]), np.array([0, 1, 0]))
        array([1, 0, 1])
    """
    rows = np.stack([np.asarray(column, np.int64) for column in columns])
    return np.unique(rows, axis=1, return_inverse=True)[1].reshape(-1).astype(np.int64)


def positions_of(numbers: Vector) -> dict[int, Vector]:
    """From each number to where it stands, numbers and positions ascending."""
    order = np.argsort(numbers, kind="stable")
    values, starts = np.unique(numbers[order], return_index=True)
    stops = [*starts[1:].tolist(), len(order)]
    return {value: order[i:j] for value, i, j in zip(values.tolist(), starts.tolist(), stops, strict=False)}
