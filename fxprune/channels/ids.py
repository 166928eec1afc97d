"""Channel ids: which slices of which tensors stand or fall together.

An id is an integer; a tensor axis carries a vector of them, one per index. Unifications, pins and products are only
recorded while a graph is walked and resolved once, on whole arrays, by `Ids.solve`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
        self._pins: list[tuple[Vector, int]] = []
        self._products: list[tuple[Vector, Vector, Vector]] = []
        self._product_of: dict[tuple[bytes, bytes], Vector] = {}
        self._factors_of: dict[tuple[bytes, int], tuple[Vector, Vector]] = {}

    def fresh(self, count: int) -> Vector:
        """New ids, related to nothing."""
        self.size += count
        return np.arange(self.size - count, self.size, dtype=np.int64)

    def unify(self, a: Vector, b: Vector) -> None:
        """Make a[i] and b[i] the same channel."""
        if a is not b:
            self._pairs.append((a, b))

    def pin(self, ids: Vector, reason: Callable[[], str]) -> None:
        """Declare that `ids` cannot be removed; `reason` says why when asked."""
        if not self.reasons or self.reasons[-1] is not reason:
            self.reasons.append(reason)
        self._pins.append((ids, len(self.reasons) - 1))

    def product(self, a: Vector, b: Vector) -> Vector:
        """Ids of the row-major flattening of a two-axis grid: position (i, j) exists while a[i] and b[j] do."""
        key = (a.tobytes(), b.tobytes())
        if key not in self._product_of:
            self._relate(self.fresh(len(a) * len(b)), a, b)
        return self._product_of[key]

    def split(self, ids: Vector, rows: int) -> tuple[Vector, Vector]:
        """Factors of an axis that is viewed as a `rows` x n grid; `product` of them gives `ids` back."""
        key = (ids.tobytes(), rows)
        if key not in self._factors_of:
            self._relate(ids, self.fresh(rows), self.fresh(len(ids) // rows))
        return self._factors_of[key]

    def _relate(self, ids: Vector, a: Vector, b: Vector) -> None:
        self._product_of[a.tobytes(), b.tobytes()] = ids
        self._factors_of[ids.tobytes(), len(a)] = (a, b)
        self._products.append((ids, np.repeat(a, len(b)), np.tile(b, len(a))))

    def solve(self) -> Classes:
        """Resolve every recorded relation (connected components by hooking and pointer jumping, on arrays)."""
        parent = np.arange(self.size, dtype=np.int64)
        a, b = _joined([p[0] for p in self._pairs]), _joined([p[1] for p in self._pairs])
        while True:
            a, b = parent[a], parent[b]
            differ = a != b
            if not differ.any():
                break
            a, b = a[differ], b[differ]
            parent[np.maximum(a, b)] = np.minimum(a, b)
            while True:
                above = parent[parent]
                if np.array_equal(above, parent):
                    break
                parent = above
        roots, of = np.unique(parent, return_inverse=True)
        reason = np.full(len(roots), len(self.reasons), dtype=np.int64)
        if self._pins:
            pinned = of[_joined([p[0] for p in self._pins])]
            np.minimum.at(reason, pinned, np.repeat([p[1] for p in self._pins], [len(p[0]) for p in self._pins]))
        grid = [of[_joined([p[k] for p in self._products])] for k in range(3)]
        if len(grid[0]):
            code = np.unique(np.stack(grid), axis=1)
            grid = [code[0], code[1], code[2]]
        return Classes(of.astype(np.int64), len(roots), reason, self.reasons, grid[0], grid[1], grid[2])


@dataclass
class Classes:
    """What `Ids.solve` found: `of[id]` is the id's class; a class with a reason is pinned."""

    of: Vector
    count: int
    reason: Vector
    reasons: list[Callable[[], str]]
    whole: Vector
    left: Vector
    right: Vector

    @property
    def pinned(self) -> Mask:
        return self.reason < len(self.reasons)

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


def _joined(parts: list[Vector]) -> Vector:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
