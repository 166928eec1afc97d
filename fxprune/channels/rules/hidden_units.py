"""Hidden units of recurrent layers: one layer in one direction, and which of its units are zero at every step.

A unit is a row of every gate, an entry of both biases of every gate, a column of the weight that reads the state, and
an entry of the state. It is zero behind every step where the one gate that adds to it, the candidate, gives zero, and
where what it carries on starts at zero: c = f * c + i * tanh(0) and h = o * tanh(c) of an LSTM, which carries c;
h = (1 - z) * tanh(0) + z * h of a GRU; h = tanh(0) or relu(0) of an RNN, which carries nothing. The candidate may read
units that are zero in the same way, and start at zero: all steps follow by induction.

With a projection the state h is computed from o * tanh(c) by a further weight. Then there are two kinds of units: those
of the cell c, and those of h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from fxprune.channels.axes import Axis
from fxprune.channels.ids import Mask, Vector
from fxprune.channels.readers import Bias
from fxprune.channels.rules.initial_states import State
from fxprune.channels.rules.layers import Layer, column_facts, read_weight
from fxprune.channels.values import Value, settled
from fxprune.channels.walk import Walk


@dataclass(frozen=True)
class Kind:
    """How a unit computes.

    Attributes:
        gates: how many rows of each weight belong to a unit.
        candidate: the gate that adds to the state.
        adds_biases: whether the candidate sees the sum of the two biases; else each must be zero, since a GRU scales
            one.
        carries: whether a unit carries what it was before on: c of an LSTM, h of a GRU.
    """

    gates: int
    candidate: int
    adds_biases: bool
    carries: bool


LSTM, GRU, RNN = Kind(4, 2, True, True), Kind(3, 2, False, True), Kind(1, 0, True, False)


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
        zero_cells, zero_states: which are zero behind every step.
        silent: which states are zero at the start as well.
    """

    cells: Vector
    states: Vector
    zero_cells: Mask
    zero_states: Mask
    silent: Mask

    def state(self, batch: Sequence[Axis]) -> Value:
        """The state h, or a sequence of them, behind these axes."""
        return _of_units(batch, self.states, self.zero_states)

    def cell(self, batch: Sequence[Axis]) -> Value:
        """The state c."""
        return _of_units(batch, self.cells, self.zero_cells)


def _of_units(batch: Sequence[Axis], ids: Vector, zero: Mask) -> Value:
    where = torch.from_numpy(zero).reshape([1] * len(batch) + [-1])
    return settled((*batch, units_axis(ids)), where, torch.zeros((), dtype=torch.float64))


def units_axis(ids: Vector) -> Axis:
    """The axis of some units."""
    return Axis.plain(1) if len(ids) == 1 else Axis.of(ids)


def beside(units: Sequence[Units], batch: Sequence[Axis]) -> Value:
    """The states of several directions, one behind the other on the last axis."""
    ids, zero = ([getattr(each, name) for each in units] for name in ("states", "zero_states"))
    return _of_units(batch, np.concatenate(ids), np.concatenate(zero))


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
    units = Units(cells, states, *_zero_units(walk, kind, direction, data, start))
    _read(walk, node, direction.inputs, data, direction.input_bias)
    _read(walk, node, direction.states, _of_units((), states, units.silent), None)
    if projection is not None:
        _read(walk, node, projection, units.cell(()), None)
    return units


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


def _zero_units(
    walk: Walk, kind: Kind, direction: Direction, data: Value, start: Sequence[State]
) -> tuple[Mask, Mask, Mask]:
    """Which units are zero, of the cell, of the state, and of the state at the start too: the most by induction."""
    cells, states = len(start[-1].zeros), len(start[0].zeros)
    if not walk.facts:
        return np.zeros(cells, bool), np.zeros(states, bool), np.zeros(states, bool)

    def stored(operand: fx.Node) -> np.ndarray:
        facts = walk.value(operand).facts
        assert facts is not None
        return facts.value.numpy()

    candidate = slice(kind.candidate * cells, (kind.candidate + 1) * cells)
    inputs = stored(direction.inputs)
    columns = column_facts(data, data.rank - 1, 1, inputs.shape[1])
    silent = columns.known[0] & (columns.value[0] == 0)
    zero_cells = ~((inputs[candidate] != 0) & ~silent).any(1)
    if kind.carries:
        zero_cells &= start[-1].zeros
    biases = [stored(bias)[candidate] for bias in (direction.input_bias, direction.state_bias) if bias is not None]
    for bias in [sum(biases)] if kind.adds_biases and biases else biases:
        zero_cells &= bias == 0
    reads = stored(direction.states)[candidate] != 0
    projects = None if direction.projection is None else stored(direction.projection) != 0
    while True:
        zero_states = zero_cells if projects is None else ~(projects & ~zero_cells).any(1)
        silent = zero_states & start[0].zeros
        left = zero_cells & ~(reads & ~silent).any(1)
        if (left == zero_cells).all():
            return zero_cells, zero_states, silent
        zero_cells = left
