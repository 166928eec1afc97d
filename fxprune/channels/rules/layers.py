"""Contractions with a weight that is known: which of its columns are needed, and what of its result is constant.

Such a contraction is a `Reader`: it needs a column while a row that is alive has a weight there that is not zero.
Constant columns fold into the bias, or merge into a representative where borders of zeros forbid that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, fx

from fxprune.channels.axes import Axis
from fxprune.channels.ids import Mask, Vector
from fxprune.channels.readers import Bias, Floats, Reader
from fxprune.channels.used_weights import NO_WEIGHTS, UsedWeights
from fxprune.channels.values import Known, Value, beside, settled
from fxprune.channels.walk import Walk


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
        row_axes: the axes of the weight that hold groups and rows.
        is_view: whether `table` is a view of the weight, so that its columns can change there.
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
    row_axes: tuple[int, ...] = (0,)
    is_view: bool = True


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


def beside_zeros(result: Value, zeros: Tensor, shift: Known | None) -> Value:
    """The result of a layer with what is left where all that it sums is zero: the bias.

    Args:
        result: what is known of it by rows.
        zeros: where all is zero, along axes that the layer passes on; broadcasts to the result's reduced shape.
        shift: the bias as it is added, None where nothing is known of it.
    """
    if shift is None or not zeros.any():
        return result
    return beside(result, zeros & shift.where, shift.value.double())


# what is added where no bias is
NOTHING = Known.tensor(torch.zeros(1, device="cpu"))


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
        layer.call, rows.reshape(shape[0]), columns.reshape(shape[1]), NO_WEIGHTS,
        source=name, row_axes=layer.row_axes, bias=layer.bias,
        key=None if name is None else _layer_key(walk, layer.call, name),
    )  # fmt: skip
    if layer.table is not None or not walk.facts:
        walk.readers.append(reader)
    if layer.table is None:
        return None
    reader.table = layer.table
    reader.used = UsedWeights.of_table(layer.table)
    _note_constants(walk, layer, reader)
    return _known_rows(layer, reader)


def _layer_key(walk: Walk, call: fx.Node, name: str) -> tuple[object, ...]:
    axes = walk.parameters.axes[name]
    return (str(call.target), *(None if ids is None else ids.tobytes() for ids in axes))


def _note_constants(walk: Walk, layer: Layer, reader: Reader) -> None:
    """Which columns the reader does without: they are zero, fold into the bias, or merge with one that stays."""
    facts = column_facts(layer.data, layer.dim, layer.groups, layer.column_count)
    zero = facts.known & (facts.value == 0)
    uniform, bordered = facts.known & ~zero & ~facts.bordered, facts.known & facts.bordered
    folds = uniform if layer.folds else np.zeros_like(uniform)
    # only constants of one shape merge, and only in a weight that nothing else reads
    merges = bordered if layer.folds or not uniform.any() else uniform
    merges = merges & (layer.is_view and walk.is_read_once(reader.source))
    reader.soft, reader.folds, reader.merges = zero | folds | merges, folds, merges
    reader.constant = np.where(facts.known, facts.value, np.nan)


def _known_rows(layer: Layer, reader: Reader) -> RowFacts | None:
    """Rows whose every column with a weight is zero or folds, and their values."""
    assert reader.folds is not None
    assert reader.constant is not None
    assert reader.table is not None
    ignored = (reader.constant == 0) | reader.folds
    known = torch.from_numpy(~reader.used.rows_with(~ignored))
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
