"""Hidden units of recurrent layers: one layer in one direction, what its units relate to and who reads them.

A unit is a row of every gate, an entry of both biases of every gate, a column of the weight that reads the state, and
an entry of the state. With a projection the state h is computed from o * tanh(c) by a further weight. Then there are
two kinds of units: those of the cell c, and those of h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from fxprune.channels.axes import Axis
from fxprune.channels.ids import Vector
from fxprune.channels.readers import Bias, Floats
from fxprune.channels.rules.constant_units import Kind, Weights, constant_units
from fxprune.channels.rules.initial_states import State
from fxprune.channels.rules.layers import Layer, column_facts, read_weight
from fxprune.channels.values import Value, settled
from fxprune.channels.walk import Walk


@dataclass(frozen=True, eq=False)
class Direction:
    """The weights of one layer in one direction.

    Attributes:
        inputs, states: what reads the input [gates x units, inputs] and the state [gates x units, states].
        input_bias, state_bias: [gates x units] each.
        projection: from units of the cell to those of the state [states, units], None where they are the same.
    """

    inputs: fx.Node
    states: fx.Node
    input_bias: fx.Node | None
    state_bias: fx.Node | None
    projection: fx.Node | None = None

    @property
    def nodes(self) -> list[fx.Node]:
        every = (self.inputs, self.states, self.input_bias, self.state_bias, self.projection)
        return [node for node in every if node is not None]


@dataclass(frozen=True, eq=False)
class Units:
    """The units of one layer in one direction: those of the cell, and those of the state.

    Attributes:
        cells, states: ids.
        constant_cells, constant_states: those that are the same behind every step, NaN for the others.
    """

    cells: Vector
    states: Vector
    constant_cells: Floats
    constant_states: Floats

    def state(self, batch: Sequence[Axis]) -> Value:
        """The state h, or a sequence of them, behind these axes."""
        return _of_units(batch, self.states, self.constant_states)

    def cell(self, batch: Sequence[Axis]) -> Value:
        """The state c."""
        return _of_units(batch, self.cells, self.constant_cells)


def _of_units(batch: Sequence[Axis], ids: Vector, numbers: Floats) -> Value:
    """A value of units behind these axes; NaN stands for what is not known."""
    values = torch.from_numpy(numbers).reshape([1] * len(batch) + [-1])
    return settled((*batch, units_axis(ids)), ~values.isnan(), values.nan_to_num())


def units_axis(ids: Vector) -> Axis:
    """The axis of some units."""
    return Axis.plain(1) if len(ids) == 1 else Axis.of(ids)


def beside(units: Sequence[Units], batch: Sequence[Axis]) -> Value:
    """The states of several directions, one behind the other on the last axis."""
    ids = np.concatenate([each.states for each in units])
    return _of_units(batch, ids, np.concatenate([each.constant_states for each in units]))


def relate_direction(
    walk: Walk, node: fx.Node, kind: Kind, direction: Direction, data: Value, start: Sequence[State]
) -> Units:
    """Relate the units of one layer in one direction, and record what reads what.

    Args:
        walk: where.
        node: the call.
        kind: of the layer.
        direction: its weights; stored where constants are followed.
        data: the input, its last axis of one factor.
        start: the states at the start, h and, of an LSTM, c.
    """
    projection = direction.projection
    states = _columns(walk, node, direction.states)
    cells = states if projection is None else _columns(walk, node, projection)
    for state, own in zip(start, (states, cells), strict=False):
        state.tie(walk, own)
    _tie(walk, node, direction.inputs, np.tile(cells, kind.gates))
    _tie(walk, node, direction.states, np.tile(cells, kind.gates))
    for bias in (direction.input_bias, direction.state_bias):
        if bias is not None:
            _tie(walk, node, bias, np.tile(cells, kind.gates))
    if projection is not None:
        _tie(walk, node, projection, states)
    constant_states, constant_cells = _constants(walk, kind, direction, data, start)
    _read(walk, node, direction.inputs, data, direction.input_bias)
    carried = np.where((constant_states == 0) & start[0].zeros, 0.0, np.nan)
    _read(walk, node, direction.states, _of_units((), states, carried), None)
    if projection is not None:
        _read(walk, node, projection, _of_units((), cells, np.where(constant_cells == 0, 0.0, np.nan)), None)
    return Units(cells, states, constant_cells, constant_states)


def _columns(walk: Walk, node: fx.Node, weight: fx.Node) -> Vector:
    """The ids of a weight's columns; of a single one, or of those that carry none, new ones that stay."""
    value, ids = walk.merged(node, walk.value(weight), 1)
    if ids is None:
        ids = walk.ids.fresh(int(walk.shape(weight)[1]))
        walk.pin(node, ids, "a single unit" if value.axes[1].is_one else "units that meet no channels")
    return ids


def _tie(walk: Walk, node: fx.Node, operand: fx.Node, units: Vector) -> None:
    """Make the rows of a weight or bias those of units."""
    value, ids = walk.merged(node, walk.value(operand), 0)
    if ids is not None:
        walk.ids.unify(ids, units)
    elif not value.axes[0].is_one:
        walk.pin(node, units, "units that meet an axis without channels")


def _read(walk: Walk, node: fx.Node, weight_node: fx.Node, data: Value, bias_node: fx.Node | None) -> None:
    """Record a weight that reads the last axis of `data`."""
    weight, rows = walk.merged(node, walk.value(weight_node), 0)
    bias = None if bias_node is None else walk.value(bias_node)
    alone = bias is not None and walk.is_alone(bias.source)
    dim = data.rank - 1
    joined = walk.join(node, [data.axes[dim], weight.axes[1]])
    if not data.axes[dim].is_one:
        data = data.relayout(dim, joined)
    table = None if weight.facts is None else weight.facts.value.unsqueeze(0).unsqueeze(-1)
    row_count, column_count = walk.shape(weight_node)
    layer = Layer(
        node, data, dim, weight, table, rows, joined.ids, 1, row_count, column_count,
        folds=alone, bias=Bias(bias_node if alone else None), bias_value=bias,
    )  # fmt: skip
    read_weight(walk, layer)


def _constants(
    walk: Walk, kind: Kind, direction: Direction, data: Value, start: Sequence[State]
) -> tuple[Floats, Floats]:
    """`constant_units` of a layer; NaN where constants are not followed."""
    if not walk.facts:
        return np.full(len(start[0].zeros), np.nan), np.full(len(start[-1].zeros), np.nan)

    def stored(operand: fx.Node) -> Tensor:
        facts = walk.value(operand).facts
        assert facts is not None
        return facts.value.double()

    inputs, states = stored(direction.inputs), stored(direction.states)
    biases = [stored(bias) for bias in (direction.input_bias, direction.state_bias) if bias is not None]
    projection = None if direction.projection is None else stored(direction.projection)
    found = column_facts(data, data.rank - 1, 1, inputs.shape[1])
    columns = np.where(found.known[0] & ~(found.bordered[0] & (found.value[0] != 0)), found.value[0], np.nan)
    weights = Weights(kind, inputs, states, biases, projection)
    return constant_units(weights, columns, [state.zeros for state in start])
