"""Channel ids: which slices of which tensors stand or fall together.

An id is an integer; a tensor axis carries a vector of them, one per index. Unifications, pins and products are only
recorded while a graph is walked and resolved once, on whole arrays, by `Ids.solve`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Ids:
    """Allocates ids and records what relates them."""

    def __init__(self) -> None:
        self.size = 0
        self.reasons: list[Callable[[], str]] = []
        self._pairs: list[tuple[Vector, Vector]] = []
        self._pins: list[tuple[Vector, int, object]] = []
        self._products: list[tuple[Vector, Vector, Vector]] = []
        self._product_of: dict[tuple[bytes, bytes], Vector] = {}
        self._factors_of: dict[tuple[bytes, int], tuple[Vector, Vector]] = {}

    def fresh(self, count: int) -> Vector:
        """New ids, related to nothing."""
        self.size += count
        return np.arange(self.size - count, self.size, dtype=np.int64)

    def unify(self, first: Vector, second: Vector) -> None:
        """Make first[i] and second[i] the same channel; as many of each, or a ValueError at the rule that errs."""
        if len(first) != len(second):
            raise ValueError(f"{len(first)} channels cannot be the same as {len(second)}")
        if first is not second:
            self._pairs.append((first, second))

    def pin(self, ids: Vector, reason: Callable[[], str], by: object = None) -> None:
        """Declare that `ids` cannot be removed; `reason` says why when asked, `by` is what would not run without."""
        if not self.reasons or self.reasons[-1] is not reason:
            self.reasons.append(reason)
        self._pins.append((ids, len(self.reasons) - 1, by))

    def product(self, outer: Vector, inner: Vector) -> Vector:
        """Ids of the row-major flattening of a grid: position (i, j) exists while outer[i] and inner[j] do."""
        key = (outer.tobytes(), inner.tobytes())
        if key not in self._product_of:
            self._relate(self.fresh(len(outer) * len(inner)), outer, inner)
        return self._product_of[key]

    def split(self, ids: Vector, rows: int) -> tuple[Vector, Vector]:
        """Factors of an axis that is viewed as a `rows` x n grid; `product` of them gives `ids` back."""
        key = (ids.tobytes(), rows)
        if key not in self._factors_of:
            self._relate(ids, self.fresh(rows), self.fresh(len(ids) // rows))
        return self._factors_of[key]

    def _relate(self, ids: Vector, outer: Vector, inner: Vector) -> None:
        self._product_of[outer.tobytes(), inner.tobytes()] = ids
        self._factors_of[ids.tobytes(), len(outer)] = (outer, inner)
        self._products.append((ids, np.repeat(outer, len(inner)), np.tile(inner, len(outer))))

    def solve(self) -> Classes:
        """Resolve every recorded relation."""
        firsts, seconds = (_joined([pair[side] for pair in self._pairs]) for side in range(2))
        roots, of = np.unique(_components(self.size, firsts, seconds), return_inverse=True)
        grid = [of[_joined([product[part] for product in self._products])] for part in range(3)]
        if len(grid[0]):
            grid = list(distinct(*grid)[:3])
        of = of.astype(np.int64)
        pins = [(of[ids], by) for ids, _, by in self._pins]
        return Classes(
            of, len(roots), self._first_reasons(of, len(roots)), self.reasons, grid[0], grid[1], grid[2], pins
        )

    def _first_reasons(self, of: Vector, count: int) -> Vector:
        """By class the first reason that pins it, the number of reasons where none does."""
        reason = np.full(count, len(self.reasons), dtype=np.int64)
        if self._pins:
            pinned = of[_joined([ids for ids, *_ in self._pins])]
            of_pin = np.repeat([number for _, number, _ in self._pins], [len(ids) for ids, *_ in self._pins])
            np.minimum.at(reason, pinned, of_pin)
        return reason


def _components(size: int, firsts: Vector, seconds: Vector) -> Vector:
    """By id the least one that pairs connect it with: hooking and pointer jumping, on arrays."""
    parent = np.arange(size, dtype=np.int64)
    while True:
        firsts, seconds = parent[firsts], parent[seconds]
        differ = firsts != seconds
        if not differ.any():
            return parent
        firsts, seconds = firsts[differ], seconds[differ]
        parent[np.maximum(firsts, seconds)] = np.minimum(firsts, seconds)
        while not np.array_equal(above := parent[parent], parent):
            parent = above


@dataclass
class Classes:
    """What `Ids.solve` found: `of[id]` is the id's class; a class with a reason is pinned, `pins` say by what."""

    of: Vector
    count: int
    reason: Vector
    reasons: list[Callable[[], str]]
    whole: Vector
    left: Vector
    right: Vector
    pins: list[tuple[Vector, object]] = field(default_factory=list)

    @property
    def pinned(self) -> Mask:
        return self.reason < len(self.reasons)

    def pinned_by(self, counts: Callable[[object], bool]) -> Mask:
        """The classes that something pins which counts."""
        found = np.zeros(self.count, bool)
        for classes, by in self.pins:
            if counts(by):
                found[classes] = True
        return found

    def close(self, alive: Mask) -> bool:
        """Extend `alive` in place until a grid position is alive exactly where both its factors are."""
        changed = False
        while len(self.whole):
            before = int(alive.sum())
            seen = alive[self.whole]
            alive[self.left[seen]] = True
            alive[self.right[seen]] = True
            alive[self.whole[alive[self.left] & alive[self.right]]] = True
            if int(alive.sum()) == before:
                break
            changed = True
        return changed


def distinct(*columns: Vector) -> tuple[Vector, ...]:
    """The distinct tuples of columns of numbers that are not negative, ascending, a column each; and how often each is.

    As `np.unique` with an axis, which compares tuples one by one and takes fifty times as long.

    Example:
        >>> distinct(np.array([2, 1, 2]), np.array([0, 5, 0]))
        (array([1, 2]), array([5, 0]), array([1, 2]))
    """
    spans = [int(column.max(initial=0)) + 1 for column in columns]
    if math.prod(spans) < np.iinfo(np.int64).max:
        keys = np.zeros(len(columns[0]), np.int64)
        for column, span in zip(columns, spans, strict=True):
            keys = keys * span + column
        keys, counts = np.unique(keys, return_counts=True)
        found = list[Vector]()
        for span in reversed(spans):
            keys, column = np.divmod(keys, span)
            found.append(column)
        return *reversed(found), counts
    order = np.lexsort(columns[::-1])
    ordered = [column[order] for column in columns]
    new = np.ones(len(order), bool)
    new[1:] = np.any([column[1:] != column[:-1] for column in ordered], axis=0)
    starts = np.flatnonzero(new)
    return *(column[starts] for column in ordered), np.diff(np.append(starts, len(order)))


def _joined(parts: list[Vector]) -> Vector:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
