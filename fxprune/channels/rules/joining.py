"""Data movement that joins tensors or grows them: concatenation and padding."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn import functional

from fxprune.channels.axes import ONE, Axis
from fxprune.channels.edits import Count, SetArguments
from fxprune.channels.ids import Vector
from fxprune.channels.registry import OperatorCall, register
from fxprune.channels.values import Known, Value, settled, widened
from fxprune.channels.walk import Walk

aten = torch.ops.aten


@register(aten.cat, aten.concat, aten.concatenate)
@dataclass(frozen=True, eq=False)
class Concatenation(OperatorCall):
    """Tensors one after another along an axis."""

    tensors: list[fx.Node]
    dim: int

    def relate(self, walk: Walk) -> Value:
        rank = len(walk.shape(self.node))
        # torch skips one-dimensional empty tensors
        values = [value for value in map(walk.value, self.tensors) if value.rank == rank]
        dim = self.dim % rank
        if any(value.axes[dim].carries for value in values) and all(_has_fixed_size(v.axes[dim]) for v in values):
            return concatenated(walk, self.node, values, dim)
        axes, values = _joined_beside(walk, self.node, values, dim)
        for value in values:
            walk.pin_axis(self.node, value.axes[dim], "concatenated with an axis of free size")
        values = [value.relayout(dim, Axis.carrying(value.axes[dim].size, None)) for value in values]
        axes[dim] = Axis.plain(walk.shape(self.node)[dim])
        return _where_all_agree(axes, values)


@register(aten.stack)
@dataclass(frozen=True, eq=False)
class Stack(OperatorCall):
    """Tensors one after another along a new axis."""

    tensors: list[fx.Node]
    dim: int

    def relate(self, walk: Walk) -> Value:
        dim = self.dim % len(walk.shape(self.node))
        values = []
        for tensor, value in zip(self.tensors, map(walk.value, self.tensors), strict=True):
            ids = walk.singles.get(tensor)
            single = len(self.tensors) == 1
            axes = [*value.axes[:dim], ONE if ids is None or single else Axis.of(ids), *value.axes[dim:]]
            values.append(value.moved(axes, lambda tensor: tensor.unsqueeze(dim)))
            if single:
                walk.pin(self.node, ids, "the only channel")
                return values[0]
        result = concatenated(walk, self.node, values, dim)
        if any(tensor in walk.singles for tensor in self.tensors) and (ids := result.axes[dim].ids) is not None:
            walk.nonempty.append(ids)
        return result


def _has_fixed_size(axis: Axis) -> bool:
    return all(type(factor.size) is int for factor in axis)


def _joined_beside(walk: Walk, node: fx.Node, values: list[Value], dim: int) -> tuple[list[Axis], list[Value]]:
    """The axes beside the one that is concatenated, unified, and the values laid out that way; that one is ONE."""
    axes = [ONE] * values[0].rank
    for other in (d for d in range(values[0].rank) if d != dim):
        axes[other] = axis = walk.join(node, [value.axes[other] for value in values])
        values = [v if v.axes[other].is_one or v.axes[other] is axis else v.relayout(other, axis) for v in values]
    return axes, values


def concatenated(walk: Walk, node: fx.Node, values: list[Value], dim: int) -> Value:
    """Values one after another along an axis of fixed size."""
    axes, values = _joined_beside(walk, node, values, dim)
    parts: list[Vector] = []
    laid: list[Value] = []
    for value in values:
        value, ids = walk.merged(node, value, dim)
        if ids is None:
            ids = walk.ids.fresh(value.axes[dim].size)
            walk.pin(node, ids, "an operand that carries no channels")
        parts.append(ids)
        laid.append(value)
    axes[dim] = Axis.of(np.concatenate(parts))
    if all(value.facts is None for value in laid):
        return Value(tuple(axes))
    shapes = [[len(part) if d == dim else axis.reduced for d, axis in enumerate(axes)] for part in parts]

    def joined(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
        missing = torch.zeros((), dtype=dtype)
        pieces = [missing if tensor is None else widened(tensor) for tensor in tensors]
        return torch.cat([piece.expand(shape) for piece, shape in zip(pieces, shapes, strict=True)], dim)

    facts = [value.facts for value in laid]
    where = joined([None if known is None else known.where for known in facts], torch.bool)
    constant = joined([None if known is None else known.value for known in facts], torch.float64)
    borders = [None if known is None else known.border for known in facts]
    bordered = sum(border is not None for border in borders)
    if bordered == 0:
        return settled(axes, where, constant)
    border = joined(borders, torch.bool)
    # borders of different widths do not merge
    return settled(axes, where, constant, border) if bordered == 1 else settled(axes, where & ~border, constant)


def _where_all_agree(axes: list[Axis], values: list[Value]) -> Value:
    """What is known of tensors that are laid one after another along an opaque axis."""
    facts = [value.facts for value in values if value.facts is not None]
    if not values or len(facts) < len(values):
        return Value(tuple(axes))
    first = facts[0].value
    same = [known.inner & (known.value == first) for known in facts[1:]]
    return settled(axes, functools.reduce(operator.and_, same, facts[0].inner), first)


@register(
    aten.pad, aten.constant_pad_nd, aten.reflection_pad1d, aten.reflection_pad2d, aten.reflection_pad3d,
    aten.replication_pad1d, aten.replication_pad2d, aten.replication_pad3d, aten._pad_circular,
)  # fmt: skip
@dataclass(frozen=True, eq=False)
class Padding(OperatorCall):
    """Entries added before and after the last axes, (before, after) from the last axis on."""

    data: fx.Node
    amounts: list[Any]
    value: float | None = None
    mode: str | None = None
    aliases: ClassVar = {"amounts": ("pad", "padding")}

    @property
    def fill(self) -> float | None:
        """The constant that is added, None where entries are copied."""
        constant = self.mode == "constant" or self.node.target is aten.constant_pad_nd.default
        return (self.value or 0) if constant else None

    def relate(self, walk: Walk) -> Value:
        value = walk.value(self.data)
        amounts = list(self.amounts)
        wanted = list(self.amounts)
        over_space = False
        if not any(amounts):
            walk.pass_maps(self.data, self.node)
        for at in range(0, len(amounts), 2):
            dim = value.rank - 1 - at // 2
            before, after = amounts[at : at + 2]
            if (before, after) == (0, 0):
                continue
            value, ids = walk.merged(self.node, value, dim)
            grows = all(isinstance(amount, int) and amount >= 0 for amount in (before, after))
            if ids is None or self.fill is None or not grows:
                value = walk.blur(self.node, value, [dim], f"{self.mode or self.node.target} padding of the channels")
                value = value.cut(dim, Axis.plain(walk.shape(self.node)[dim]))
                over_space = True
                continue
            first, last = walk.ids.fresh(before), walk.ids.fresh(after)
            wanted[at : at + 2] = Count(first), Count(last)
            value = self._grown(walk, value, dim, np.concatenate([first, ids, last]), [0] * at + [before, after])
        if wanted != amounts:
            walk.edits.append(SetArguments(self.node, {"pad": wanted}))
        value = Value(value.axes, value.facts)
        return self._bordered(value) if over_space and self.fill is not None else value

    def _grown(self, walk: Walk, value: Value, dim: int, ids: Vector, grow: list[int]) -> Value:
        """`value` with channels added whose entries are the constant."""
        axes = value.replaced_axis(dim, Axis.of(ids))
        if not walk.facts:
            return Value(axes)
        shape = [axis.reduced for axis in value.axes]
        facts = value.facts or Known(torch.zeros(shape).double(), torch.zeros(shape, dtype=torch.bool))
        border = None if facts.border is None else functional.pad(facts.border, grow)
        where = functional.pad(facts.where, grow, value=True)
        return Value(axes, Known(functional.pad(facts.value, grow, value=self.fill), where, border))

    def _bordered(self, value: Value) -> Value:
        """What is known of a value whose space got a border of the constant."""
        if value.facts is None:
            return value
        known = value.facts.inner
        border = known & (value.facts.value != self.fill)
        if self.fill == 0:
            return replace(value, facts=replace(value.facts, where=known, border=border, stored=False))
        return replace(value, facts=replace(value.facts, where=known & ~border, border=None, stored=False))
