"""Products of two values, summed over what they share: with a weight, a layer; of two activations, what each needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from fxprune.borrowing import share_memory
from fxprune.channels.axes import Axis
from fxprune.channels.ids import Vector
from fxprune.channels.readers import MULTIPLIED, Bias, Reader
from fxprune.channels.rules.labels import Labels
from fxprune.channels.rules.layers import NOTHING, Layer, beside_zeros, read_weight
from fxprune.channels.used_weights import UsedWeights
from fxprune.channels.values import Value, settled
from fxprune.channels.walk import Walk


@dataclass(frozen=True, eq=False)
class Added:
    """What is added to a product, and how.

    Attributes:
        value: what is added; None where nothing is.
        place: where it stands, or would.
        folds: whether constants can be added to what comes out.
        counts_once: whether product and `value` are taken as they are.
    """

    value: Value | None = None
    place: Bias = field(default_factory=Bias)
    folds: bool = True
    counts_once: bool = True


def contract(walk: Walk, node: fx.Node, labels: Labels, left: Value, right: Value, added: Added) -> Value:
    """A product of two values, summed over what they share, plus what is added."""
    left, left_labels = summed_alone(walk, node, left, labels.left, labels.right + labels.out)
    right, right_labels = summed_alone(walk, node, right, labels.right, labels.left + labels.out)
    labels = replace(labels, left=left_labels, right=right_labels)
    for label in labels.contracted:
        left = walk.flat(node, left, labels.left.index(label))
        right = walk.flat(node, right, labels.right.index(label))
    for own, data, weight in ((labels, left, right), (labels.swapped, right, left)):
        known = weight.stored if walk.facts else weight.source is not None
        if known and _is_summed_in_step(own, data, weight):
            return _Layer.of(walk, node, own, data, weight).value(walk, added)
    return _product(walk, node, labels, left, right, added)


def summed_alone(walk: Walk, node: fx.Node, value: Value, own: str, elsewhere: str) -> tuple[Value, str]:
    """A value summed over the labels that are nowhere else, and those that are left; of what is known, zeros are."""
    dims = [dim for dim, label in enumerate(own) if label not in elsewhere]
    if not dims:
        return value, own
    value = walk.blur(node, value, dims, "summed over")
    axes = [axis for dim, axis in enumerate(value.axes) if dim not in dims]
    total = settled(axes, value.zeros.squeeze(dims), torch.zeros(()).double())
    return total, "".join(label for label in own if label in elsewhere)


def _is_summed_in_step(labels: Labels, data: Value, weight: Value) -> bool:
    """Whether there is something to sum over, and no single index is repeated for it."""
    pairs = [
        (data.axes[labels.left.index(label)].is_one, weight.axes[labels.right.index(label)].is_one)
        for label in labels.contracted
    ]
    return bool(pairs) and all(one == other for one, other in pairs)


@dataclass(frozen=True, eq=False)
class _Layer:
    """A contraction whose right operand is a weight.

    Attributes:
        node: the call.
        labels: of the data, the weight and the result.
        data, weight: the operands.
        groups, rows: the weight's labels that the result has: those that the data has too, and its own.
        axes: by label the axis of the result, or the one that is summed over.
    """

    node: fx.Node
    labels: Labels
    data: Value
    weight: Value
    groups: str
    rows: str
    axes: Mapping[str, Axis]

    @classmethod
    def of(cls, walk: Walk, node: fx.Node, labels: Labels, data: Value, weight: Value) -> _Layer:
        """Relate the ids of the operands, label by label."""
        of_data = dict(zip(labels.left, data.axes, strict=True))
        wide = [
            label
            for label, axis in zip(labels.right, weight.axes, strict=True)
            if not axis.is_one and label not in labels.contracted
        ]
        groups = "".join(label for label in wide if label in of_data and not of_data[label].is_one)
        rows = "".join(label for label in wide if label not in groups)
        for label in rows:
            weight = walk.flat(node, weight, labels.right.index(label))
        of_weight = dict(zip(labels.right, weight.axes, strict=True))
        axes = of_weight | of_data | {label: of_weight[label] for label in rows}
        for label in groups + labels.contracted:
            axes[label] = walk.join(node, [of_data[label], of_weight[label]])
        return cls(node, labels, data, weight, groups, rows, axes)

    def value(self, walk: Walk, added: Added) -> Value:
        """Record the reader; returns the result."""
        ids = {label: walk.vector(self.node, self.axes[label]) for label in self.groups + self.rows}
        rows = walk.vector(self.node, self._merged(self.groups + self.rows))
        bias, per_row = added.value, self._is_per_row(added.value)
        axes = dict(self.axes)
        if bias is not None and per_row and not bias.axes[0].is_one:
            axis = walk.join(self.node, [self._merged(self.rows), bias.axes[0]])
            axes |= dict.fromkeys(self.rows, axis)
            bias, rows = bias.relayout(0, axis), axis.ids
        takes_bias = per_row and added.counts_once
        ids_beside = self._ids_of_a_bias(ids)
        place = added.place if takes_bias and (bias is not None or added.place.argument) else Bias(ids=ids_beside)
        data, columns = self._columns_last(walk)
        table = self._table()
        layer = Layer(
            self.node, data, data.rank - 1, self.weight, table, rows, columns,
            self._count(self.groups), self._count(self.rows), self._count(self.labels.contracted),
            folds=added.folds and ids_beside is not None, bias=place, bias_value=bias if per_row else None,
            row_axes=tuple(self.labels.right.index(label) for label in self.groups + self.rows),
            is_view=table is None or _is_view(table, self.weight),
        )  # fmt: skip
        known = read_weight(walk, layer)
        result = Value(tuple(axes[label] for label in self.labels.out))
        if known is not None and ids_beside is not None and added.counts_once:
            own = self.groups + self.rows
            result = known.spread(result.axes, [axes[c].reduced if c in own else 1 for c in self.labels.out])
        if walk.facts and (bias is None or not per_row or added.counts_once):
            result = beside_zeros(result, self._zeros(), NOTHING if bias is None or not per_row else bias.facts)
        return result if per_row else _sum(walk, self.node, result, added)

    def _zeros(self) -> Tensor:
        """Where all that is summed is zero, along the axes of the result that the data has."""
        left, data = self.labels.left, self._joined_data()
        summed = [left.index(label) for label in self.labels.contracted]
        zeros = data.zeros.all(summed, keepdim=True)
        sizes = dict(zip(left, zeros.shape, strict=True))
        zeros = zeros.permute([*(left.index(label) for label in self.labels.out if label in sizes), *summed])
        return zeros.reshape([sizes.get(label, 1) for label in self.labels.out])

    def _joined_data(self) -> Value:
        """The data whose axes of groups and columns are those of the weight as well."""
        data = self.data
        for label in self.groups + self.labels.contracted:
            dim = self.labels.left.index(label)
            if not data.axes[dim].is_one:
                data = data.relayout(dim, self.axes[label])
        return data

    def _merged(self, labels: str) -> Axis:
        """The row-major product of the axes of some labels."""
        return Axis(tuple(factor for label in labels for factor in self.axes[label]))

    def _count(self, labels: str) -> int:
        sizes = dict(zip(self.labels.right, self.weight.sizes, strict=True))
        return math.prod(int(sizes[label]) for label in labels)

    def _is_per_row(self, bias: Value | None) -> bool:
        """Whether there is no bias, or it has one entry for each row, which are last."""
        if bias is None:
            return True
        single = not self.rows or self._merged(self.rows).is_one
        last = not self.groups and len(self.rows) <= 1 and (single or self.labels.out.endswith(self.rows))
        return bias.rank == 1 and last and (single or not bias.axes[0].is_one)

    def _ids_of_a_bias(self, ids: Mapping[str, Vector | None]) -> tuple[Vector | None, ...] | None:
        """The ids of what can be added to the result, from the first axis of rows on, None for an axis of size one.

        None where the rows are not in the order in which the result has them, or carry no channels.
        """
        own = [label for label in self.labels.out if label in ids]
        if own != [*self.groups, *self.rows] or any(vector is None for vector in ids.values()):
            return None
        first = self.labels.out.index(own[0]) if own else len(self.labels.out)
        return tuple(ids.get(label) for label in self.labels.out[first:])

    def _columns_last(self, walk: Walk) -> tuple[Value, Vector | None]:
        """The data with groups and columns as one last axis, and the ids of this axis."""
        summed = self.groups + self.labels.contracted
        others = [dim for dim, label in enumerate(self.labels.left) if label not in summed]
        data, order = self._joined_data(), [*others, *(self.labels.left.index(label) for label in summed)]
        data = data.moved([data.axes[dim] for dim in order], lambda tensor: tensor.permute(order))
        data = merged_axes(data, len(others), len(summed))
        data = walk.flat(self.node, data, len(others))
        return data, walk.vector(self.node, self._merged(summed))

    def _table(self) -> Tensor | None:
        """The weight as [groups, rows, columns, 1]."""
        if self.weight.facts is None:
            return None
        own = self.groups + self.rows + self.labels.contracted
        ones = [label for label in self.labels.right if label not in own]
        value = self.weight.facts.value.permute([self.labels.right.index(label) for label in [*ones, *own]])
        counts = (self._count(labels) for labels in (self.groups, self.rows, self.labels.contracted))
        return value.reshape(*counts, 1)


def _is_view(table: Tensor, weight: Value) -> bool:
    assert weight.facts is not None
    return share_memory(table, weight.facts.value)


def merged_axes(value: Value, first: int, count: int) -> Value:
    """A value with `count` axes in a row as one, of size one where there are none."""
    if count == 1:
        return value
    one = Axis(tuple(factor for axis in value.axes[first : first + count] for factor in axis))
    axes = [*value.axes[:first], one, *value.axes[first + count :]]
    return value.moved(axes, lambda tensor: tensor.reshape([axis.reduced for axis in axes]))


def read_product(walk: Walk, node: fx.Node, spare: Tensor, batch: Sequence[Axis], columns: Vector) -> None:
    """Record a product of two activations, which needs its columns except where they are `spare` [*batch, columns]."""
    lengths = [axis.reduced for axis in batch]
    need = ~spare.expand(*lengths, len(columns))
    gates = [axis for axis, length in zip(batch, lengths, strict=True) if length > 1]
    rows: Vector | None = None
    # with several axes of channels no single one says which columns are needed; opaque factors are free
    for ids in [factor.ids for factor in gates[0] if factor.ids is not None] if len(gates) == 1 else []:
        rows = ids if rows is None else walk.ids.product(rows, ids)
    if rows is None:
        used = need.reshape(-1, len(columns)).any(0)[None, None].numpy()
        walk.readers.append(Reader(node, None, columns[None], UsedWeights.of(used), why=MULTIPLIED))
    else:
        used = need.reshape(1, len(rows), -1).numpy()
        walk.readers.append(Reader(node, rows[None], columns[None], UsedWeights.of(used), why=MULTIPLIED))


def _product(walk: Walk, node: fx.Node, labels: Labels, left: Value, right: Value, added: Added) -> Value:
    """A product of two activations."""
    operands = (left, labels.left), (right, labels.right)
    axes = {
        label: walk.join(node, [value.axes[own.index(label)] for value, own in operands if label in own])
        for label in labels.contracted + labels.batch + labels.outer + labels.inner
    }
    left = _laid_out(left, labels.left, axes, labels.batch + labels.outer + labels.contracted)
    right = _laid_out(right, labels.right, axes, labels.batch + labels.contracted + labels.inner)
    rank, summed = len(labels.batch), len(labels.contracted)
    left, right = merged_axes(left, left.rank - summed, summed), merged_axes(right, rank, summed)
    left, right = walk.flat(node, left, left.rank - 1), walk.flat(node, right, rank)
    joined = Axis(tuple(factor for label in labels.contracted for factor in axes[label]))
    columns = walk.vector(node, joined)
    if columns is not None and walk.facts:
        zero_left = left.zeros.reshape(*left.zeros.shape[:rank], -1, left.zeros.shape[-1]).all(-2)
        zero_right = right.zeros.reshape(*right.zeros.shape[: rank + 1], -1).all(-1)
        read_product(walk, node, zero_left | zero_right, [axes[label] for label in labels.batch], columns)
    out = tuple(axes[label] for label in labels.out)
    result = Value(out)
    if walk.facts and labels.out == labels.batch + labels.outer + labels.inner and len(labels.outer) <= 1 == summed:
        result = _averaged(left, right, rank, out, bool(labels.outer))
    if walk.facts and result.facts is None:
        result = _zeros(labels, axes, left, right)
    return result if added.value is None else _sum(walk, node, result, added)


def _sum(walk: Walk, node: fx.Node, product: Value, added: Added) -> Value:
    """A product and what is added: known where both are."""
    assert added.value is not None
    axes, (product, other) = walk.broadcast(node, [product, added.value])
    if product.facts is None or other.facts is None or not added.counts_once:
        return Value(axes)
    return settled(axes, product.facts.inner & other.facts.inner, product.facts.value + other.facts.value.double())


def _laid_out(value: Value, own: str, axes: Mapping[str, Axis], order: str) -> Value:
    """An operand with the axes of these labels, in this order, those that it lacks of size one."""
    for dim, label in enumerate(own):
        if not value.axes[dim].is_one and value.axes[dim] is not axes[label]:
            value = value.relayout(dim, axes[label])
    missing = "".join(label for label in order if label not in own)
    value, own = value.lead(len(missing)), missing + own
    dims = [own.index(label) for label in order]
    sums = value.sums and dims[-1] == len(dims) - 1
    return value.moved([value.axes[dim] for dim in dims], lambda tensor: tensor.permute(dims), sums)


def _averaged(left: Value, right: Value, rank: int, out: tuple[Axis, ...], has_rows: bool) -> Value:
    """Constants of the right operand [*batch, contracted, ...] that pass weights that sum to one, and zeros."""
    facts = right.facts
    if facts is None or facts.border is not None or right.axes[rank].carries:
        return Value(out)
    # an equation repeats a single column
    averaged = left.sums and left.axes[-1].is_one == right.axes[rank].is_one
    where, value = facts.where if averaged else facts.zeros, facts.value
    if not has_rows:
        where, value = where.squeeze(rank), value.squeeze(rank)
    return settled(out, where, value)


def _zeros(labels: Labels, axes: Mapping[str, Axis], left: Value, right: Value) -> Value:
    """What of a product is zero because in every summand one of the factors is."""
    out, rank = tuple(axes[label] for label in labels.out), len(labels.batch)
    if not left.zeros.any() and not right.zeros.any():
        return Value(out)
    batch = [axes[label].reduced for label in labels.batch]
    one, other = ~left.zeros, ~right.zeros
    one = one.reshape(*one.shape[:rank], -1, one.shape[-1]).expand(*batch, -1, -1)
    other = other.reshape(*other.shape[: rank + 1], -1).expand(*batch, -1, -1)
    counts = one.float() @ other.float()
    order = labels.batch + labels.outer + labels.inner
    laid = (counts == 0).reshape([axes[label].reduced for label in order])
    return settled(out, laid.permute([order.index(label) for label in labels.out]), torch.zeros(()).double())
