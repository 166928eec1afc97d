"""Attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.channels.axes import Axis, sizes_of
from fxprune.channels.edits import SetArguments
from fxprune.channels.ids import Vector
from fxprune.channels.readers import MULTIPLIED, Reader
from fxprune.channels.registry import Cost, OperatorCall, register
from fxprune.channels.rules.products import read_product
from fxprune.channels.used_weights import UsedWeights
from fxprune.channels.values import Value, beside, settled
from fxprune.channels.walk import DRAWS, Result, Walk

aten = torch.ops.aten


@register(aten.scaled_dot_product_attention)
@dataclass(frozen=True, eq=False)
class Attention(OperatorCall):
    """softmax(q k^T / scale) v over [..., heads, positions, channels]; key-value heads may be fewer (`enable_gqa`)."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    attn_mask: fx.Node | None
    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool

    def relate(self, walk: Walk) -> Result:
        if walk.draws(self.node):
            return walk.refuse(self.node, DRAWS)
        query, key, value = (walk.value(operand) for operand in (self.query, self.key, self.value))
        rank = query.rank
        batch: list[Axis] = []
        for dim in range(rank - 2):
            if self.enable_gqa and dim == rank - 3:
                query, key, value = self._relate_shared_heads(walk, query, key, value)
                batch.append(query.axes[dim])
            else:
                joined, (query, key, value) = self._joined(walk, dim, query, key, value)
                batch.append(joined)
        query, key, value = (walk.flat(self.node, operand, rank - 1) for operand in (query, key, value))
        _, (query, key) = self._joined(walk, rank - 1, query, key)
        query, key, value = (
            walk.blur(self.node, operand, [rank - 2], "positions of an attention") for operand in (query, key, value)
        )
        self._relate_mask(walk, batch)
        self._read(walk, query, key, batch)
        return self._passed(self._averaged(walk, query, key, value), (*batch, query.axes[-2], value.axes[-1]))

    def _joined(self, walk: Walk, dim: int, *operands: Value) -> tuple[Axis, list[Value]]:
        """An axis of the operands unified, and the operands laid out that way."""
        joined = walk.join(self.node, [operand.axes[dim] for operand in operands])
        return joined, [value if value.axes[dim].is_one else value.relayout(dim, joined) for value in operands]

    def _relate_shared_heads(self, walk: Walk, query: Value, key: Value, value: Value) -> tuple[Value, Value, Value]:
        """Each key-value head with the query heads that share it."""
        dim = query.rank - 3
        query, many = walk.merged(self.node, query, dim)
        key, _ = walk.merged(self.node, key, dim)
        value, _ = walk.merged(self.node, value, dim)
        few = walk.join(self.node, [key.axes[dim], value.axes[dim]]).ids
        if many is not None and few is not None and len(many) % len(few) == 0:
            shared, _ = walk.ids.split(many, len(few))
            walk.ids.unify(shared, few)
        else:
            for operand in (query, key, value):
                walk.pin_axis(self.node, operand.axes[dim], "grouped-query heads")
        return query, key, value

    def _relate_mask(self, walk: Walk, batch: Sequence[Axis]) -> None:
        if self.attn_mask is None:
            return
        mask = walk.value(self.attn_mask)
        for axis in mask.axes[-2:]:
            walk.pin_axis(self.node, axis, "the last axes of an attention mask")
        leading = mask.axes[:-2]
        if leading:
            walk.broadcast(self.node, [Value(tuple(batch[-len(leading) :])), Value(leading)])

    def _read(self, walk: Walk, query: Value, key: Value, batch: Sequence[Axis]) -> None:
        """The logits as a product of queries and keys, whose scale stays that of all channels."""
        columns = query.axes[-1].ids
        if columns is None:
            return
        if self.scale is None:
            channels = walk.shape(self.query)[-1]
            walk.edits.append(SetArguments(self.node, {"scale": 1.0 / math.sqrt(channels)}))
        if not walk.facts:
            return
        if self.enable_gqa:
            spare = _zero_columns(query, columns) | _zero_columns(key, columns)
            used = UsedWeights.of(~spare.numpy()[None, None])
            walk.readers.append(Reader(self.node, None, columns[None], used, why=MULTIPLIED))
        else:
            spare = query.zeros.all(-2) | self._uniform_keys(key)
            read_product(walk, self.node, spare, batch, columns)

    @staticmethod
    def _uniform_keys(key: Value) -> Tensor:
        """Columns that are the same for all positions: they shift every logit of a row alike, which softmax ignores."""
        uniform = key.zeros.all(-2)
        if key.facts is not None:
            first = key.facts.value[..., :1, :]
            uniform = uniform | (key.facts.inner & (key.facts.value == first)).all(-2)
        return uniform

    def _averaged(self, walk: Walk, query: Value, key: Value, value: Value) -> Value:
        """The values with what is known of their means, where a head weights all positions alike."""
        means = walk.means.get(self.value)
        if means is None or not means.are_over(value.axes, [value.rank - 2]):
            return value
        if self.attn_mask is not None or self.is_causal or self.enable_gqa:
            return value
        alike = (query.zeros.all(-2) | self._uniform_keys(key)).all(-1)
        return beside(value, means.where & alike[..., None, None], means.value)

    def _passed(self, value: Value, axes: tuple[Axis, ...]) -> Value:
        """Constant channels of the values, which weights that sum to one leave as they are."""
        facts = value.facts
        if facts is None or self.enable_gqa or self.dropout_p:
            return Value(axes)
        # a mask may leave a row without weights
        where = facts.inner if self.attn_mask is None else facts.zeros
        return settled(axes, where, facts.value)

    def costs(self, env: Mapping[fx.Node, Result]) -> Sequence[Cost]:
        query, key, value = (sizes_of(operand) for operand in (self.query, self.key, self.value))
        pairs = math.prod(query[:-1]) * key[-2]
        own, values = env.get(self.query), env.get(self.value)
        heads = own.axes[:-2] if isinstance(own, Value) else ()
        return [
            Cost(float(pairs * query[-1]), (*heads, *_last(own))),
            Cost(float(pairs * value[-1]), (*heads, *_last(values))),
        ]


def _last(value: Any) -> tuple[Axis, ...]:
    return value.axes[-1:] if isinstance(value, Value) else ()


def _zero_columns(value: Value, columns: Vector) -> Tensor:
    return value.zeros.reshape(-1, len(columns)).all(0)
