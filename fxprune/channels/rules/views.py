"""Data movement that keeps every element: views, permutations, axes of size one, repetition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxprune.channels.axes import ONE, Axis, Factor, Size, quotient, reduced_shape, same_size
from fxprune.channels.edits import Count, LayOut, SetArguments
from fxprune.channels.registry import OperatorCall, register
from fxprune.channels.rules.creation import resize
from fxprune.channels.values import Value, settled
from fxprune.channels.walk import Walk

aten = torch.ops.aten


def regrouped(walk: Walk, factors: Sequence[Factor], sizes: Sequence[Size]) -> list[Axis] | None:
    """The factors of one row-major layout as axes of these sizes, split where they must be; None where they cannot."""
    pending = list(reversed(factors))
    axes: list[Axis] = []
    for size in sizes:
        axis: list[Factor] = []
        left = size
        while not same_size(left, 1):
            if not pending:
                return None
            factor = pending.pop()
            if same_size(factor.size, left):
                axis.append(factor)
                break
            rest = quotient(left, factor.size)
            if rest is not None:
                axis.append(factor)
                left = rest
                continue
            inner = quotient(factor.size, left)
            if inner is None:
                return None
            outer_ids, inner_ids = (None, None) if factor.ids is None else walk.ids.split(factor.ids, left)
            axis.append(Factor(left, outer_ids))
            pending.append(Factor(inner, inner_ids))
            break
        axes.append(Axis(tuple(axis)))
    return None if pending else axes


@register(
    aten.view.default, aten.reshape, aten._unsafe_view, aten.flatten.using_ints, aten.unflatten.int, aten.view_as,
    aten.reshape_as,
)  # fmt: skip
@dataclass(frozen=True, eq=False)
class View(OperatorCall):
    """The same elements in row-major order under other axes."""

    data: fx.Node
    # the literal sizes, of all axes or (unflatten) of those that `dim` becomes
    sizes: list[Any] | None = None
    dim: int | None = None
    aliases: ClassVar = {"sizes": ("size", "shape", "sizes")}

    def relate(self, walk: Walk) -> Value:
        value, sizes = walk.viewed(self.node, self.data), walk.shape(self.node)
        axes = regrouped(walk, [factor for axis in value.axes for factor in axis], sizes)
        if axes is None:
            before, after = list(map(str, value.sizes)), list(map(str, sizes))
            walk.pin_value(self.node, value, f"regroups sizes {before} into {after}")
            return Value(tuple(Axis.plain(size) for size in sizes))
        self._resize(walk, value.rank, axes)
        same_last = bool(value.axes and axes and same_size(value.axes[-1].size, axes[-1].size))
        shape, means = reduced_shape(axes), walk.means.get(self.data)
        if means is not None and means.last < len(shape) and all(map(same_size, value.sizes[: means.last + 1], sizes)):
            walk.means[self.node] = means.moved(lambda tensor: tensor.reshape(shape))
        return value.moved(axes, lambda tensor: tensor.reshape(shape), value.sums and same_last)

    def _resize(self, walk: Walk, rank: int, axes: list[Axis]) -> None:
        if self.sizes is None:  # flatten and `view_as` state none
            return
        if self.dim is not None:
            first = self.dim % rank
            resize(walk, self.node, "sizes", self.sizes, axes[first : first + len(self.sizes)])
        else:
            name = "shape" if self.node.target is aten.reshape.default else "size"
            resize(walk, self.node, name, self.sizes, axes)


@dataclass(frozen=True, eq=False)
class _Permutation(OperatorCall):
    """Axes in another order."""

    data: fx.Node

    def order(self, rank: int) -> list[int]:
        """Which axis stands where."""
        raise NotImplementedError

    def relate(self, walk: Walk) -> Value:
        value = walk.viewed(self.node, self.data)
        order = self.order(value.rank)
        last_stays = order[-1:] == [value.rank - 1]
        if self.data in walk.means:
            walk.means[self.node] = walk.means[self.data].permuted(order)
        return value.moved([value.axes[d] for d in order], lambda t: t.permute(order), value.sums and last_stays)


@register(aten.permute)
@dataclass(frozen=True, eq=False)
class Permute(_Permutation):
    """Axes in a given order."""

    dims: list[int]

    def order(self, rank: int) -> list[int]:
        return [dim % rank for dim in self.dims]


@register(aten.transpose.int, aten.swapaxes, aten.swapdims, aten.t, aten.mT, aten.adjoint)
@dataclass(frozen=True, eq=False)
class Transpose(_Permutation):
    """Two axes exchanged, the last two where none are named."""

    first: int = -2
    second: int = -1
    aliases: ClassVar = {"first": ("dim0", "axis0"), "second": ("dim1", "axis1")}

    def order(self, rank: int) -> list[int]:
        order = list(range(rank))
        if rank > 1:
            order[self.first], order[self.second] = order[self.second], order[self.first]
        return order


@register(aten.numpy_T)
@dataclass(frozen=True, eq=False)
class Reversal(_Permutation):
    """All axes in reverse order."""

    def order(self, rank: int) -> list[int]:
        return list(reversed(range(rank)))


@register(aten.movedim, aten.moveaxis)
@dataclass(frozen=True, eq=False)
class MoveAxes(_Permutation):
    """Some axes moved, the others in their order."""

    source: Any
    destination: Any

    def order(self, rank: int) -> list[int]:
        source, destination = (_dims(dims, rank) for dims in (self.source, self.destination))
        order = [dim for dim in range(rank) if dim not in source]
        for to, dim in sorted(zip(destination, source, strict=True)):
            order.insert(to, dim)
        return order


def _dims(dims: Any, rank: int) -> list[int]:
    return [dim % rank for dim in (dims if isinstance(dims, list | tuple) else [dims])]


@register(aten.unsqueeze)
@dataclass(frozen=True, eq=False)
class Unsqueeze(OperatorCall):
    """A new axis of size one."""

    data: fx.Node
    dim: int

    def relate(self, walk: Walk) -> Value:
        value = walk.viewed(self.node, self.data)
        dim = self.dim % (value.rank + 1)
        axes = [*value.axes[:dim], ONE, *value.axes[dim:]]
        return value.moved(axes, lambda tensor: tensor.unsqueeze(dim), value.sums and dim < value.rank)


@register(aten.squeeze)
@dataclass(frozen=True, eq=False)
class Squeeze(OperatorCall):
    """Axes of size one dropped: those named, or all."""

    data: fx.Node
    dim: Any = None

    def relate(self, walk: Walk) -> Value:
        value = walk.viewed(self.node, self.data)
        named = range(value.rank) if self.dim is None else _dims(self.dim, value.rank) if value.rank else []
        gone = [dim for dim in named if value.axes[dim].is_one]
        axes = [axis for dim, axis in enumerate(value.axes) if dim not in gone]
        return value.moved(axes, lambda t: t.squeeze(sorted(gone)), value.sums and value.rank - 1 not in gone)


@register(aten.expand, aten.broadcast_to)
@dataclass(frozen=True, eq=False)
class Expand(OperatorCall):
    """Axes of size one repeated without copying."""

    data: fx.Node
    size: list[Any]

    def relate(self, walk: Walk) -> Value:
        value, shape = walk.viewed(self.node, self.data), walk.shape(self.node)
        value = value.lead(len(shape) - value.rank)
        axes = tuple(_expanded(walk, axis, size) for axis, size in zip(value.axes, shape, strict=True))
        resize(walk, self.node, "size", self.size, axes)
        facts = value.facts
        result = Value(axes) if facts is None else settled(axes, facts.where, facts.value, facts.border)
        return replace(result, sums=value.sums and bool(value.axes) and not value.axes[-1].is_one)


def _expanded(walk: Walk, axis: Axis, size: Size) -> Axis:
    if not axis.is_one or same_size(size, 1):
        return axis
    return Axis.of(walk.ids.fresh(size)) if type(size) is int else Axis.plain(size)


@register(aten.expand_as)
@dataclass(frozen=True, eq=False)
class ExpandAs(OperatorCall):
    """Axes of size one repeated to the size of another tensor."""

    data: fx.Node
    other: fx.Node

    def relate(self, walk: Walk) -> Value:
        value = walk.viewed(self.node, self.data)
        axes, (laid, _) = walk.broadcast(self.node, [value, walk.value(self.other)])
        return (
            Value(axes) if laid.facts is None else settled(axes, laid.facts.where, laid.facts.value, laid.facts.border)
        )


@register(aten.repeat, aten.tile)
@dataclass(frozen=True, eq=False)
class Repeat(OperatorCall):
    """Copies side by side: along each axis the count is an outer factor."""

    data: fx.Node
    counts: list[Any]
    aliases: ClassVar = {"counts": ("repeats", "dims")}

    def relate(self, walk: Walk) -> Value:
        value = walk.value(self.data)
        counts = [count.meta["val"] if isinstance(count, fx.Node) else count for count in self.counts]
        counts = [1] * (value.rank - len(counts)) + counts
        value = value.lead(len(counts) - value.rank)
        copies = [self._copies(walk, count) for count in counts]
        axes = [outer + axis for outer, axis in zip(copies, value.axes, strict=True)]
        if len(counts) == len(self.counts):
            resize(
                walk, self.node, "repeats" if self.node.target is aten.repeat.default else "dims", self.counts, copies
            )
        else:
            for outer in copies:
                walk.pin_axis(self.node, outer, "repeats fewer axes than there are")
        if value.facts is None:
            return Value(tuple(axes))
        beside = [size for axis in value.axes for size in (1, axis.reduced)]
        spread = [
            size for outer, axis in zip(copies, value.axes, strict=True) for size in (outer.reduced, axis.reduced)
        ]
        facts = replace(value.facts, stored=False)

        def repeated(tensor: Tensor) -> Tensor:
            return tensor.reshape(beside).expand(spread).reshape(reduced_shape(axes))

        return replace(value, facts=facts).moved(axes, repeated)

    def _copies(self, walk: Walk, count: Size) -> Axis:
        if same_size(count, 1):
            return ONE
        return Axis.carrying(count, walk.ids.fresh(count) if type(count) is int else None)


@register(aten.repeat_interleave.self_int, aten.repeat_interleave.self_Tensor)
@dataclass(frozen=True, eq=False)
class RepeatInterleave(OperatorCall):
    """Each index repeated in place: the count is an inner factor."""

    data: fx.Node
    repeats: Any
    dim: int | None = None
    output_size: Any = None

    def relate(self, walk: Walk) -> Any:
        if not isinstance(self.repeats, int) or self.dim is None:
            return walk.refuse(self.node, "repeats by data, or over all axes")
        value, count = walk.value(self.data), self.repeats
        dim = self.dim % value.rank
        ids = walk.ids.fresh(count)
        changes: dict[str, Any] = {"repeats": Count(ids)}
        if self.output_size is not None:  # it follows from the count
            changes["output_size"] = None
        walk.edits.append(SetArguments(self.node, changes))
        axes = value.replaced_axis(dim, Axis((*value.axes[dim].factors, Factor(count, ids))))
        facts = None if value.facts is None else replace(value.facts, stored=False)
        return replace(value, facts=facts).moved(axes, lambda tensor: tensor.repeat_interleave(count, dim))


@register(aten.view_as_complex, aten.view_as_real, aten.real, aten.imag)
@dataclass(frozen=True, eq=False)
class ComplexParts(OperatorCall):
    """The two parts of complex numbers along a last axis as the numbers, the numbers as their parts, or one part."""

    data: fx.Node

    def relate(self, walk: Walk) -> Value:
        value = walk.value(self.data)
        if self.node.target is aten.view_as_real.default:
            return settled([*value.axes, Axis.plain(2)], value.zeros[..., None], torch.zeros(()))
        if self.node.target is not aten.view_as_complex.default:
            return settled(value.axes, value.zeros, torch.zeros(()))
        walk.edits.append(LayOut(self.node))  # torch asks for even strides
        value = walk.blur(self.node, value, [value.rank - 1], "the parts of complex numbers")
        return settled(value.axes[:-1], value.zeros.squeeze(-1), torch.zeros(()))
