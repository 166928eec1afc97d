"""What the analysis holds of a tensor value: its axes, and which of its entries do not depend on the input."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from fxprune.borrowing import Borrowed
from fxprune.channels.axes import ONE, Axis, Factor, Size, reduced_shape, same_size
from fxprune.graph.working_memory import slices_at_once

Move: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Known:
    """Entries that are the same for every input, in reduced form.

    Attributes:
        value: their values; what stands where nothing is known has no meaning.
        where: which entries are known, in the shape of `value`.
        border: known entries that are surrounded by zeros or averaged with them (a constant channel after zero
            padding): multiples of one map over space, the same for every channel.
        stored: the values are those of a parameter or buffer, or computed from such alone as eager computes them.
    """

    value: Tensor
    where: Tensor
    border: Tensor | None = None
    stored: bool = False

    @classmethod
    def tensor(cls, value: Tensor) -> Known:
        """A parameter or buffer: all of it is known."""
        return cls(value, _everywhere(value), stored=True)

    @property
    def inner(self) -> Tensor:
        """Which entries are known, borders aside."""
        return self.where if self.border is None else self.where & ~self.border

    @property
    def zeros(self) -> Tensor:
        """Which entries are known to be zero."""
        return self.where & (self.value == 0)

    def map(self, move: Move) -> Known:
        """The same after a movement of data in reduced form."""
        value = move(self.value)
        where = _everywhere(value) if self.stored else move(self.where)
        return Known(value, where, None if self.border is None else move(self.border), self.stored)


_TRUE = torch.ones((), dtype=torch.bool, device="cpu")


def _everywhere(value: Tensor) -> Tensor:
    return _TRUE.expand(value.shape)


def on_cpu() -> contextlib.AbstractContextManager[object]:
    """Where constants are followed: new tensors are on the CPU, whatever torch's default device is."""
    if torch.get_default_device().type == "cpu":  # entering a device makes every call of torch slower
        return contextlib.nullcontext()
    return torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor value.

    Attributes:
        axes: its axes.
        facts: the entries that no input changes; None where there are none.
        sums: the last axis holds weights which sum to one.
        source: the parameter or buffer that the value is.
    """

    axes: tuple[Axis, ...]
    facts: Known | None = None
    sums: bool = False
    source: str | None = None

    @property
    def sizes(self) -> list[Size]:
        return [axis.size for axis in self.axes]

    @property
    def rank(self) -> int:
        return len(self.axes)

    @property
    def stored(self) -> bool:
        """Whether the value is that of a parameter or buffer, or computed from such alone."""
        return self.facts is not None and self.facts.stored

    @property
    def zeros(self) -> Tensor:
        """Which entries are known to be zero, in reduced form."""
        found = torch.zeros((), dtype=torch.bool) if self.facts is None else self.facts.zeros
        return found.expand(reduced_shape(self.axes))

    def cut(self, dim: int, axis: Axis) -> Value:
        """The value with an axis along which nothing is known cut to another size."""
        sums = self.sums and dim != self.rank - 1
        return Value(self.replaced_axis(dim, axis), self.facts, sums)

    def without_source(self) -> Value:
        return replace(self, source=None)

    def moved(self, axes: Sequence[Axis], move: Move, sums: bool = False) -> Value:
        """The value after a movement of data that is `move` in reduced form."""
        return Value(tuple(axes), None if self.facts is None else self.facts.map(move), sums)

    def replaced_axis(self, dim: int, *axes: Axis) -> tuple[Axis, ...]:
        """The axes with others in the place of one."""
        return (*self.axes[:dim], *axes, *self.axes[dim + 1 :])

    def lead(self, count: int) -> Value:
        """The value with leading axes of size one."""
        index = (None,) * count
        facts = None if self.facts is None else self.facts.map(lambda tensor: tensor[index])
        return Value((ONE,) * count + self.axes, facts, self.sums)

    def relayout(self, dim: int, target: Axis) -> Value:
        """The value with an axis described as `target`: the same factors, some of them merged, or now opaque."""
        dim %= self.rank
        axis, axes = self.axes[dim], self.replaced_axis(dim, target)
        if self.facts is None or axis.is_one or axis is target:
            return replace(self, axes=axes)
        wanted = target.factors if target.carries else axis.opaque().factors
        if len(wanted) == len(axis) and not any(map(_loses_ids, axis, wanted)):
            return replace(self, axes=axes)
        if len(wanted) == len(axis):
            facts = _uniform(self.facts, dim, axis.factors, wanted)
        elif len(wanted) == 1:
            facts = _spread(self.facts, dim, axis.factors)
        else:
            facts = _partly_merged(self.facts, dim, axis.factors, wanted)
        final = (*self.facts.value.shape[:dim], axes[dim].reduced, *self.facts.value.shape[dim + 1 :])
        return Value(axes, replace(facts.map(lambda tensor: tensor.reshape(final)), stored=False), self.sums)


@dataclass(frozen=True, eq=False)
class Stack(Value):
    """Values along a first axis, whose last axes carry channels each of their own, equally many of which stay.

    Its own axes are those of the first part: whoever does not take single parts reads it by `Walk.value`, which makes
    the channels of all parts the same.

    Attributes:
        parts: the values.
    """

    parts: tuple[Value, ...] = ()

    @classmethod
    def of(cls, parts: Sequence[Value]) -> Value:
        """The value of a stack, a plain one where there is one part."""
        if len(parts) == 1:
            return parts[0].lead(1)
        return cls((Axis.plain(len(parts)), *parts[0].axes), parts=tuple(parts))

    @property
    def common(self) -> Value:
        """The stack as one value: known is what is the same in every part."""
        parts = [part.facts for part in self.parts if part.facts is not None]
        if len(parts) < len(self.parts):
            return Value(self.axes)
        shape = reduced_shape(self.parts[0].axes)
        same = torch.stack([(part.inner & (part.value == parts[0].value)).expand(shape) for part in parts]).all(0)
        return settled(self.axes, same[None], parts[0].value.expand(shape)[None])


def _loses_ids(before: Factor, after: Factor) -> bool:
    return before.ids is not None and after.ids is None


def _unfolded(facts: Known, dim: int, factors: Sequence[Factor]) -> Known:
    """The facts with an axis split into its factors, in reduced form."""
    shape = facts.value.shape
    split = (*shape[:dim], *(factor.reduced for factor in factors), *shape[dim + 1 :])
    return facts.map(lambda tensor: tensor.reshape(split))


def _uniform(facts: Known, dim: int, factors: Sequence[Factor], wanted: Sequence[Factor]) -> Known:
    """What stays known where some factors of an axis turn opaque: what is the same along them."""
    facts = _unfolded(facts, dim, factors)
    where, value = facts.inner, facts.value
    lost = [dim + i for i, (before, after) in enumerate(zip(factors, wanted, strict=True)) if _loses_ids(before, after)]
    for d in lost:
        first = value.narrow(d, 0, 1)
        where = where.all(d, keepdim=True) & _same_along(value, first, d)
        value = first
    return Known(value, where)


def _same_along(value: Tensor, first: Tensor, dim: int) -> Tensor:
    """Where all entries along an axis are those of `first`, some of them at a time."""
    if isinstance(value, Borrowed):  # it is compared where it is
        return (value == first).all(dim, keepdim=True)
    same = torch.ones(first.shape, dtype=torch.bool, device=first.device)
    many = slices_at_once(first.nbytes)
    for start in range(0, value.shape[dim], many):
        same &= (value.narrow(dim, start, min(many, value.shape[dim] - start)) == first).all(dim, keepdim=True)
        if not same.any():
            break
    return same


def _spread(facts: Known, dim: int, factors: Sequence[Factor]) -> Known:
    """The facts with every factor of an axis at its full size."""
    shape = facts.value.shape
    full = (*shape[:dim], *(factor.size for factor in factors), *shape[dim + 1 :])
    return _unfolded(facts, dim, factors).map(lambda tensor: tensor.expand(full))


def _partly_merged(facts: Known, dim: int, factors: Sequence[Factor], wanted: Sequence[Factor]) -> Known:
    """The facts where neighbouring factors are merged into those wanted, at full size within these."""
    kept: list[Factor] = []
    sizes: list[int] = []
    pending = list(reversed(factors))
    for factor in wanted:
        run = [pending.pop()]
        while not same_size(math.prod(own.size for own in run), factor.size):
            run.append(pending.pop())
        kept += run if factor.ids is not None else [own.opaque() for own in run]
        sizes += [own.size for own in run] if factor.ids is not None else [1] * len(run)
    facts = _uniform(facts, dim, factors, kept)
    shape = facts.value.shape
    full = (*shape[:dim], *sizes, *shape[dim + len(factors) :])
    return facts.map(lambda tensor: tensor.expand(full))


def settled(axes: Sequence[Axis], where: Tensor, value: Tensor, border: Tensor | None = None) -> Value:
    """A value known where `where` says, expanded to the reduced shape of `axes`."""
    if not where.any():
        return Value(tuple(axes))
    shape = reduced_shape(axes)
    facts = Known(value.expand(shape), where.expand(shape), None if border is None else border.expand(shape))
    return Value(tuple(axes), facts)


def beside(value: Value, where: Tensor, more: Tensor) -> Value:
    """A value of which more is known, in reduced form; what was known stays as it was."""
    facts = value.facts
    if facts is None:
        return settled(value.axes, where, torch.where(where, more, 0))
    return settled(value.axes, facts.where | where, torch.where(facts.where, facts.value, more), facts.border)


def widened(value: Tensor) -> Tensor:
    """Small floating-point tensors in float64, in which constants are computed."""
    return value.double() if value.is_floating_point() and value.numel() <= 1 << 20 else value
