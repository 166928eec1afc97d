"""Contractions: what they share, and products of matrices in all their spellings.

A contraction with a known weight is a `Reader`: it needs a column while a row that is alive has a weight there that is
not zero. Constant columns fold into the bias, or merge into a representative where borders of zeros forbid that.
"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxprune.channels.arguments import bound
from fxprune.channels.axes import ONE, Axis, sizes_of
from fxprune.channels.ids import Mask, Vector
from fxprune.channels.readers import Bias, Floats, Reader
from fxprune.channels.registry import Cost, OperatorCall, Traffic, register
from fxprune.channels.values import Value, settled
from fxprune.channels.walk import Result, Walk

aten = torch.ops.aten


class ColumnFacts(NamedTuple):
    """What is known of each column whatever the other indices."""

    known: Mask
    value: Floats
    bordered: Mask


class RowFacts(NamedTuple):
    """Which rows of a contraction's result are known, and their values."""

    known: Tensor
    value: Tensor

    def spread(self, axes: Sequence[Axis], shape: Sequence[int]) -> Value:
        """The result with these axes, whose rows are laid out by `shape`."""
        value = torch.where(self.known, self.value, 0).reshape(list(shape))
        return settled(axes, self.known.reshape(list(shape)), value)


@dataclass(frozen=True, eq=False)
class Layer:
    """A contraction with a weight that is known, in groups.

    Attributes:
        call: the node. data, dim: its input and the axis that is contracted.
        weight: the weight's value. table: a view of it [groups, rows, columns, taps]; None where it is not known.
        rows, columns: ids of outputs and inputs, None where they carry none.
        groups, row_count, column_count: groups, outputs and inputs of each.
        folds: whether a constant column adds the same everywhere.
        bias, bias_value: where constants go, and what is there.
        row_axis: the axis of the weight that holds the rows.
    """

    call: fx.Node
    data: Value
    dim: int
    weight: Value
    table: Tensor | None
    rows: Vector | None
    columns: Vector | None
    groups: int
    row_count: int
    column_count: int
    folds: bool
    bias: Bias
    bias_value: Value | None
    row_axis: int = 0


def column_facts(value: Value, dim: int, groups: int, count: int) -> ColumnFacts:
    """What is known of the columns along one axis of a value, [groups, columns of a group]."""
    shape = groups, count
    if value.facts is None:
        return ColumnFacts(np.zeros(shape, bool), np.zeros(shape), np.zeros(shape, bool))
    lengths = [axis.reduced for axis in value.axes]

    def columns(tensor: Tensor) -> Tensor:
        return tensor.expand(lengths).movedim(dim, -1).reshape(-1, lengths[dim])

    values = columns(value.facts.value).double()
    fixed = columns(value.facts.where).all(0) & (values == values[0]).all(0) & values[0].isfinite()
    border = torch.zeros_like(fixed) if value.facts.border is None else columns(value.facts.border).any(0)
    found = (fact.expand(groups * count).numpy().reshape(shape) for fact in (fixed, values[0], border))
    return ColumnFacts(*found)


def read_weight(walk: Walk, layer: Layer) -> RowFacts | None:
    """Record the reader of a layer; returns what is known of its result."""
    shape = (layer.groups, layer.row_count), (layer.groups, layer.column_count)
    rows, columns, name = layer.rows, layer.columns, layer.weight.source
    if columns is None:
        columns = walk.ids.fresh(layer.groups * layer.column_count)
        walk.pin(layer.call, columns, "inputs that carry no channels")
    if rows is None:
        rows = walk.ids.fresh(layer.groups * layer.row_count)
        walk.pin(layer.call, rows, "a single output")
    reader = Reader(
        layer.call, rows.reshape(shape[0]), columns.reshape(shape[1]), np.zeros((0, 0, 0), bool),
        source=name, row_axis=layer.row_axis, bias=layer.bias,
        key=None if name is None else _layer_key(walk, layer.call, name),
    )  # fmt: skip
    if layer.table is not None or not walk.facts:
        walk.readers.append(reader)
    if layer.table is None:
        return None
    reader.table = layer.table
    reader.used = _used(layer.table)
    _note_constants(walk, layer, reader)
    return _known_rows(layer, reader)


def _layer_key(walk: Walk, call: fx.Node, name: str) -> tuple[object, ...]:
    axes = walk.parameters.axes[name]
    return (str(call.target), *(None if ids is None else ids.tobytes() for ids in axes))


def _used(table: Tensor) -> Mask:
    nonzero = table.squeeze(-1) != 0 if table.shape[-1] == 1 else (table != 0).any(-1)
    used: Mask = nonzero.numpy()
    return used


def _note_constants(walk: Walk, layer: Layer, reader: Reader) -> None:
    """Which columns the reader does without: they are zero, fold into the bias, or merge with one that stays."""
    facts = column_facts(layer.data, layer.dim, layer.groups, layer.column_count)
    zero = facts.known & (facts.value == 0)
    uniform, bordered = facts.known & ~zero & ~facts.bordered, facts.known & facts.bordered
    folds = uniform if layer.folds else np.zeros_like(uniform)
    # only constants of one shape merge, and only in a weight that nothing else reads
    merges = bordered if layer.folds or not uniform.any() else uniform
    merges = merges & walk.is_read_once(reader.source)
    reader.soft, reader.folds, reader.merges = zero | folds | merges, folds, merges
    reader.constant = np.where(facts.known, facts.value, np.nan)


def _known_rows(layer: Layer, reader: Reader) -> RowFacts | None:
    """Rows whose every column with a weight is zero or folds, and their values."""
    assert reader.folds is not None
    assert reader.constant is not None
    assert reader.table is not None
    ignored = (reader.constant == 0) | reader.folds
    known = torch.from_numpy(~(reader.used & ~ignored[:, None, :]).any(-1))
    if not known.any():
        return None
    total = torch.zeros(known.shape).double()
    for group in np.flatnonzero(reader.folds.any(1)):
        columns = torch.from_numpy(np.flatnonzero(reader.folds[group]))
        rows = known[group].nonzero().squeeze(1)
        taps = reader.table[group][rows][:, columns].double().sum(-1)
        total[group, rows] = taps @ torch.from_numpy(reader.constant[group][reader.folds[group]])
    known, total = known.reshape(-1), total.reshape(-1)
    if layer.bias_value is not None:
        if layer.bias_value.facts is None:
            return None
        known = known & layer.bias_value.facts.where.reshape(-1)
        total = total + layer.bias_value.facts.value.double().reshape(-1)
    return RowFacts(known, total)


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
        walk.readers.append(Reader(node, None, columns[None], used))
    else:
        used = need.reshape(1, len(rows), -1).numpy()
        walk.readers.append(Reader(node, rows[None], columns[None], used))


@dataclass(frozen=True, eq=False)
class Labels:
    """A contraction as in Einstein's notation, one letter an axis.

    Attributes:
        left, right, out: of the operands and the result. batch: those that both operands and the result share, or that
            one of them is broadcast along. contracted: the one that is summed over.
    """

    left: str
    right: str
    out: str
    batch: str
    contracted: str

    @property
    def outer(self) -> str:
        """The left operand's own."""
        return "".join(c for c in self.left if c not in self.batch and c != self.contracted)

    @property
    def inner(self) -> str:
        """The right operand's own."""
        return "".join(c for c in self.right if c not in self.batch and c != self.contracted)

    @classmethod
    def of_matmul(cls, left_rank: int, right_rank: int, transposed: bool) -> Labels:
        """Those of a product of (batches of) matrices or vectors, the right one `transposed` as in a linear layer."""
        batch = string.ascii_lowercase[: max(left_rank, right_rank, 2) - 2]
        rows, columns = "M" if left_rank > 1 else "", "N" if right_rank > 1 else ""
        left_batch, right_batch = (batch[len(batch) - max(rank - 2, 0) :] for rank in (left_rank, right_rank))
        right = columns + "K" if transposed else "K" + columns
        return cls(left_batch + rows + "K", right_batch + right, batch + rows + columns, batch, "K")

    @classmethod
    def of_equation(cls, equation: str) -> Labels | None:
        """Those of an equation of two operands with one label to sum over; None for others."""
        terms = equation.replace(" ", "").replace("->", ",").split(",")
        if len(terms) != 3 or "." in equation or any(len(set(term)) < len(term) for term in terms):
            return None
        left, right, out = terms
        contracted = [c for c in left if c in right and c not in out]
        if len(contracted) != 1 or {*left, *right} - {*out} != {*contracted}:
            return None
        return cls(left, right, out, "".join(c for c in left if c in right and c in out), contracted[0])


@dataclass(frozen=True, eq=False)
class Contraction(OperatorCall):
    """A product of two operands, summed over one axis, plus a bias; the normal form of every spelling.

    Attributes:
        labels: None for an equation that is not understood.
        bias_operand: what is added, and the argument that it is.
    """

    left: fx.Node
    right: fx.Node
    labels: Labels | None
    bias_operand: fx.Node | None = None
    bias_argument: str | None = None

    @property
    def shift(self) -> fx.Node | None:
        return self.bias_operand

    def relate(self, walk: Walk) -> Result:
        labels = self.labels
        if labels is None:
            return walk.refuse(self.node, "an equation other than a product of two operands over one label")
        left, right = walk.value(self.left), walk.value(self.right)
        left = walk.flat(self.node, left, labels.left.index(labels.contracted))
        right = walk.flat(self.node, right, labels.right.index(labels.contracted))
        if self._is_layer(walk, labels, right):
            return self._layer(walk, labels, left, right)
        return self._product(walk, labels, left, right)

    def _is_layer(self, walk: Walk, labels: Labels, right: Value) -> bool:
        """Whether the right operand is a weight (or a single row of one), and its rows the result's last axis."""
        known = right.stored if walk.facts else right.source is not None
        plain = len(labels.inner) <= 1 and len(labels.right) == 1 + len(labels.inner)
        columns_last = labels.left[-1:] == labels.contracted
        return known and plain and columns_last and labels.out == labels.left[:-1] + labels.inner

    def _layer(self, walk: Walk, labels: Labels, left: Value, right: Value) -> Value:
        row_axis, column_axis = labels.right.find(labels.inner or " "), labels.right.index(labels.contracted)
        dim = left.rank - 1
        joined = walk.join(self.node, [left.axes[dim], right.axes[column_axis]])
        left = left if left.axes[dim].is_one else left.relayout(dim, joined)
        out_axis, rows = ONE, None
        if labels.inner:
            right, rows = walk.merged(self.node, right, row_axis)
            out_axis = right.axes[row_axis]
        bias = None if self.bias_operand is None else walk.value(self.bias_operand)
        per_row = bias is None or (bias.rank == 1 and (out_axis.is_one or not bias.axes[0].is_one))
        if bias is not None and per_row and not bias.axes[0].is_one:
            axis = walk.join(self.node, [out_axis, bias.axes[0]])
            bias, rows = bias.relayout(0, axis), axis.ids
        takes_bias = per_row and self._bias_counts_once
        layer = Layer(
            self.node, left, dim, right, _table(right, row_axis), rows, joined.ids, 1, out_axis.size, joined.size,
            folds=self._scale == 1, bias=Bias(self.bias_operand, self.bias_argument) if takes_bias else Bias(),
            bias_value=bias if per_row else None, row_axis=max(row_axis, 0),
        )  # fmt: skip
        known = read_weight(walk, layer)
        axes = (*left.axes[:-1], *([out_axis] if labels.inner else []))
        if bias is not None and not per_row:
            axes = walk.broadcast(self.node, [Value(axes), bias])[0]
        if known is None or not takes_bias:
            return Value(axes)
        return known.spread(axes, [-1] if labels.inner else [])

    @property
    def _scale(self) -> Any:
        """What the product is multiplied with."""
        return self.node.kwargs.get("alpha", 1)

    @property
    def _bias_counts_once(self) -> bool:
        """Whether product and bias are added as they are (`addmm` can scale both)."""
        return all(value == 1 for name, value in self.node.kwargs.items() if name in ("alpha", "beta"))

    def _product(self, walk: Walk, labels: Labels, left: Value, right: Value) -> Value:
        operands = (left, labels.left), (right, labels.right)
        axes = {
            label: walk.join(self.node, [value.axes[own.index(label)] for value, own in operands if label in own])
            for label in labels.contracted + labels.batch + labels.outer + labels.inner
        }
        left = _laid_out(left, labels.left, axes, labels.batch + labels.outer + labels.contracted)
        right = _laid_out(right, labels.right, axes, labels.batch + labels.contracted + labels.inner)
        rank = len(labels.batch)
        columns = axes[labels.contracted].ids
        if columns is not None and walk.facts:
            zero_left = left.zeros.reshape(*left.zeros.shape[:rank], -1, left.zeros.shape[-1]).all(-2)
            zero_right = right.zeros.reshape(*right.zeros.shape[: rank + 1], -1).all(-1)
            read_product(walk, self.node, zero_left | zero_right, [axes[label] for label in labels.batch], columns)
        out = tuple(axes[label] for label in labels.out)
        if self.bias_operand is not None:
            return Value(walk.broadcast(self.node, [Value(out), walk.value(self.bias_operand)])[0])
        in_order = labels.out == labels.batch + labels.outer + labels.inner and len(labels.outer) <= 1
        return _passed(left, right, rank, out, bool(labels.outer)) if walk.facts and in_order else Value(out)

    def costs(self, env: Mapping[fx.Node, Result]) -> Sequence[Cost]:
        """The product of the sizes of all labels."""
        labels = self.labels
        if labels is None:
            return ()
        contracted = sizes_of(self.left)[labels.left.index(labels.contracted)]
        macs = float(math.prod(sizes_of(self.node)) * contracted)
        result, left = env.get(self.node), env.get(self.left)
        axes = [*(result.axes if isinstance(result, Value) else ())]
        if isinstance(left, Value):
            axes.append(left.axes[labels.left.index(labels.contracted)])
        return [Cost(macs, tuple(axes))]


def _table(weight: Value, row_axis: int) -> Tensor | None:
    """A matrix as [1, rows, columns, 1]; a vector is a single row."""
    if weight.facts is None:
        return None
    value = weight.facts.value
    rows = value.unsqueeze(0) if row_axis < 0 else value.movedim(row_axis, 0)
    return rows.unsqueeze(0).unsqueeze(-1)


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


def _passed(left: Value, right: Value, rank: int, out: tuple[Axis, ...], has_rows: bool) -> Value:
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


@register(aten.linear)
@dataclass(frozen=True, eq=False)
class Linear(Contraction):
    """`input @ weight.T + bias`."""

    modules: ClassVar = (nn.Linear,)

    @classmethod
    def parse(cls, node: fx.Node) -> Self:
        given = bound(node)
        left, right = given["input"], given["weight"]
        labels = Labels.of_matmul(_rank(left), _rank(right), transposed=_rank(right) == 2)
        return cls(node, left, right, labels, given["bias"], "bias")

    @property
    def weight(self) -> fx.Node:
        return self.right

    def scaled(self, weight: Tensor, factors: Tensor) -> Tensor:
        """A weight of this call times one factor for each output."""
        return weight * factors.view(-1, 1)

    @property
    def traffic(self) -> Traffic:
        return Traffic(*(math.prod(sizes_of(operand)) for operand in (self.node, self.left, self.right)))

    @classmethod
    def module_sizes(cls, module: nn.Module) -> dict[str, Any]:
        rows, columns = module.weight.shape  # type: ignore[misc]
        return {"out_features": rows, "in_features": columns}


@register(aten.matmul, aten.mm, aten.bmm, aten.mv)
@dataclass(frozen=True, eq=False)
class MatrixProduct(Contraction):
    """A product of (batches of) matrices and vectors."""

    @classmethod
    def parse(cls, node: fx.Node) -> Self:
        left, right = node.args[:2]
        assert isinstance(left, fx.Node)
        assert isinstance(right, fx.Node)
        return cls(node, left, right, Labels.of_matmul(_rank(left), _rank(right), transposed=False))


@register(aten.addmm, aten.baddbmm)
@dataclass(frozen=True, eq=False)
class AddedProduct(Contraction):
    """A product of matrices and something added to it."""

    @classmethod
    def parse(cls, node: fx.Node) -> Self:
        added, left, right = node.args[:3]
        assert isinstance(added, fx.Node)
        assert isinstance(left, fx.Node)
        assert isinstance(right, fx.Node)
        labels = Labels.of_matmul(_rank(left), _rank(right), transposed=False)
        return cls(node, left, right, labels, added, "self")


@register(aten.einsum)
@dataclass(frozen=True, eq=False)
class Einsum(Contraction):
    """An equation of two operands with one label to sum over; others are refused."""

    @classmethod
    def parse(cls, node: fx.Node) -> Self:
        equation, operands = str(node.args[0]), node.args[1]
        assert isinstance(operands, list | tuple)
        labels = Labels.of_equation(equation) if len(operands) == 2 else None
        left, right = (operands[0], operands[-1])
        return cls(node, left, right, labels)  # type: ignore[arg-type]


def _rank(node: fx.Node) -> int:
    return len(node.meta["val"].shape)
