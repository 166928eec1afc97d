"""Axes of tensors: row-major products of factors, of which some carry channel ids.

A factor either carries a vector of ids, one per index, or is opaque (batch, space, time). An axis of size one has no
factors. In *reduced form* an axis is as long as the product of the factors that carry ids: what is known of a tensor is
the same along opaque factors, and is kept once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch

from fxprune.channels.ids import Vector
from fxprune.graph.batch import Batch

# an integer, a torch.SymInt, or the sympy expression of one
Size: TypeAlias = Any


@dataclass(frozen=True, eq=False)
class Factor:
    """One factor of an axis: `size` indices, and their ids where it carries any."""

    size: Size
    ids: Vector | None = None

    @property
    def reduced(self) -> int:
        """The factor's length in reduced form."""
        return 1 if self.ids is None else len(self.ids)

    def opaque(self) -> Factor:
        return Factor(self.size)


@dataclass(frozen=True, eq=False)
class Axis:
    """An axis of a tensor as its factors, outermost first; compared by identity."""

    factors: tuple[Factor, ...] = ()

    @classmethod
    def of(cls, ids: Vector) -> Axis:
        """An axis that carries these ids."""
        return cls((Factor(len(ids), ids),))

    @classmethod
    def carrying(cls, size: Size, ids: Vector | None) -> Axis:
        """An axis of one factor, opaque where `ids` is None."""
        return cls((Factor(size, ids),))

    @classmethod
    def plain(cls, size: Size) -> Axis:
        """An opaque axis."""
        return ONE if type(size) is int and size == 1 else cls((Factor(size),))

    def __iter__(self) -> Iterator[Factor]:
        return iter(self.factors)

    def __len__(self) -> int:
        return len(self.factors)

    def __add__(self, other: Axis) -> Axis:
        return Axis(self.factors + other.factors)

    @property
    def is_one(self) -> bool:
        """Whether the axis has size one."""
        return not self.factors

    @property
    def size(self) -> Size:
        return math.prod((factor.size for factor in self.factors), start=1)

    @property
    def reduced(self) -> int:
        """The axis' length in reduced form."""
        return math.prod(factor.reduced for factor in self.factors)

    @property
    def carries(self) -> bool:
        """Whether any factor carries ids."""
        return any(factor.ids is not None for factor in self.factors)

    @property
    def ids(self) -> Vector | None:
        """The ids of the first factor, None where it is opaque or missing: those of an axis of one factor."""
        return self.factors[0].ids if self.factors else None

    def opaque(self) -> Axis:
        """The same factors without ids."""
        return Axis(tuple(factor.opaque() for factor in self.factors))


ONE = Axis()


def reduced_shape(axes: Iterable[Axis]) -> list[int]:
    """The shape of a tensor in reduced form."""
    return [axis.reduced for axis in axes]


def same_size(first: Size, second: Size) -> bool:
    """Whether two sizes, symbols included, are the same expression."""
    if type(first) is int and type(second) is int:
        return first == second
    return bool(_expression(first) == _expression(second))


def quotient(dividend: Size, divisor: Size) -> Size | None:
    """The quotient where it is a whole number (or a whole multiple of a symbol), else None."""
    if type(dividend) is int and type(divisor) is int:
        return dividend // divisor if divisor and dividend % divisor == 0 else None
    ratio = sympy.cancel(_expression(dividend) / _expression(divisor))
    if sympy.denom(ratio) != 1:
        return None
    return int(ratio) if ratio.is_Integer else ratio


def sizes_of(node: torch.fx.Node) -> list[int]:
    """The shape of a node's tensor in numbers: of one sample where the batch is free, other free sizes as captured."""
    shape = node.meta["val"].shape
    return list(shape) if all(isinstance(size, int) for size in shape) else Batch.of(node.graph).shape(node)


def _expression(size: Size) -> Any:
    return sympy.Integer(size) if type(size) is int else getattr(getattr(size, "node", None), "expr", size)
