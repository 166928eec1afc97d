"""Which hidden units of a recurrent layer are the same behind every step: one layer in one direction.

A unit is zero behind every step where the one gate that adds to it, the candidate, gives zero, and where what it
carries on starts at zero: c = f * c + i * tanh(0) and h = o * tanh(c) of an LSTM, which carries c;
h = (1 - z) * tanh(0) + z * h of a GRU; h = tanh(0) or relu(0) of an RNN, which carries nothing. The candidate may read
units that are zero in the same way, and start at zero: all steps follow by induction.

A unit all of whose gates read constants alone, and other units of this kind, has numbers that no input changes: the
operator itself computes them. They are the same behind every step where the second gives what the first one gave, for
the unit and for all that it reads: a unit of an RNN with a bias alone is one, and one of a GRU whose state carries
nothing on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxprune.channels.ids import Mask
from fxprune.channels.readers import Floats

aten = torch.ops.aten


@dataclass(frozen=True)
class Kind:
    """How a unit computes.

    Attributes:
        gates: how many rows of each weight belong to a unit.
        candidate: the gate that adds to the state.
        adds_biases: whether the candidate sees the sum of the two biases; else each must be zero, since a GRU scales
            one.
        carries: whether a unit carries what it was before on: c of an LSTM, h of a GRU.
        layer: the operator of a layer.
    """

    gates: int
    candidate: int
    adds_biases: bool
    carries: bool
    layer: Any


LSTM = Kind(4, 2, True, True, aten.lstm.input)
GRU = Kind(3, 2, False, True, aten.gru.input)
TANH, RELU = (Kind(1, 0, True, False, layer) for layer in (aten.rnn_tanh.input, aten.rnn_relu.input))


@dataclass(frozen=True, eq=False)
class Weights:
    """Those of one layer in one direction, in float64.

    Attributes:
        kind: of the layer.
        inputs, states: [gates x cells, inputs], [gates x cells, states].
        biases: none, or two [gates x cells].
        projection: [states, cells], None where these are the same.
    """

    kind: Kind
    inputs: Tensor
    states: Tensor
    biases: Sequence[Tensor]
    projection: Tensor | None

    def candidate(self, operand: Tensor) -> Tensor:
        """The rows of the candidate."""
        return operand.chunk(self.kind.gates)[self.kind.candidate]

    def reads(self, operand: Tensor) -> Mask:
        """[cells, columns], what any gate of a cell has a weight on."""
        found: Mask = (operand != 0).unflatten(0, (self.kind.gates, -1)).any(0).numpy()
        return found

    def of_cells(self, cells: Mask) -> Mask:
        """The states that are computed from these cells alone."""
        if self.projection is None:
            return cells
        return _unread((self.projection != 0).numpy(), ~cells)

    def masked(self, cells: Mask) -> Weights:
        """With the gates of these cells alone."""
        rows = torch.from_numpy(np.tile(cells, self.kind.gates))
        inputs, states = (torch.where(rows[:, None], operand, 0) for operand in (self.inputs, self.states))
        return replace(self, inputs=inputs, states=states, biases=[torch.where(rows, b, 0) for b in self.biases])

    def step(self, columns: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
        """The states behind a step, h and, of an LSTM, c.

        Args:
            columns: the input [inputs].
            states: those before it.
        """
        before = [state.view(1, 1, -1) for state in states]
        projection = [] if self.projection is None else [self.projection]
        _, *behind = self.kind.layer(
            columns.view(1, 1, -1), before if len(before) > 1 else before[0],
            [self.inputs, self.states, *self.biases, *projection], bool(self.biases), 1, 0.0, False, False, False,
        )  # fmt: skip
        return [state.flatten() for state in behind]


def constant_units(weights: Weights, columns: Floats, start: Sequence[Mask]) -> tuple[Floats, Floats]:
    """Units that are the same behind every step: h and c, h twice where there is no c; NaN for the others.

    Args:
        weights: of one layer in one direction.
        columns: what is known of the input, the same at every step [inputs]; NaN for what is not.
        start: which states start at zero, h and, of an LSTM, c.
    """
    zero = _zero_cells(weights, columns, start)
    fixed = _fixed_cells(weights, columns, start, zero)
    if (fixed == zero).all():
        return np.where(weights.of_cells(zero), 0.0, np.nan), np.where(zero, 0.0, np.nan)
    return _computed(weights, columns, fixed, zero, len(start))


def _unread(reads: Mask, columns: Mask) -> Mask:
    """The rows of a table that read none of these columns."""
    found: Mask = np.logical_not((reads & columns).any(1))
    return found


def _zero_cells(weights: Weights, columns: Floats, start: Sequence[Mask]) -> Mask:
    """Cells that are zero behind every step: the most by induction."""
    kind = weights.kind
    zero = _unread((weights.candidate(weights.inputs) != 0).numpy(), columns != 0)
    if kind.carries:
        zero &= start[-1]
    biases = [weights.candidate(bias) for bias in weights.biases]
    for bias in [biases[0] + biases[1]] if kind.adds_biases and biases else biases:
        zero &= (bias == 0).numpy()
    reads = (weights.candidate(weights.states) != 0).numpy()
    while True:
        left = zero & _unread(reads, ~(weights.of_cells(zero) & start[0]))
        if np.array_equal(left, zero):
            return zero
        zero = left


def _fixed_cells(weights: Weights, columns: Floats, start: Sequence[Mask], zero: Mask) -> Mask:
    """Cells that no input changes, whatever their numbers at each step: the most by induction."""
    fixed = _unread(weights.reads(weights.inputs), np.isnan(columns))
    if weights.kind.carries:
        fixed &= start[-1]
    fixed |= zero
    reads = weights.reads(weights.states)
    while True:
        left = fixed & (zero | _unread(reads, ~(weights.of_cells(fixed) & start[0])))
        if np.array_equal(left, fixed):
            return fixed
        fixed = left


def _computed(weights: Weights, columns: Floats, fixed: Mask, zero: Mask, kinds: int) -> tuple[Floats, Floats]:
    """What of fixed cells a second step leaves as it was, and what these read too."""
    alone = weights.masked(fixed & ~zero)
    reads, data = alone.reads(alone.states), torch.from_numpy(np.nan_to_num(columns))
    first = alone.step(data, [data.new_zeros(size) for size in (alone.states.shape[1], len(fixed))[:kinds]])
    second = alone.step(data, first)
    same = [(one == other).numpy() & one.isfinite().numpy() for one, other in zip(first, second, strict=True)]
    cells: Mask = same[-1] & fixed
    while True:
        states: Mask = same[0] & weights.of_cells(cells)
        left = cells & _unread(reads, ~states)
        if np.array_equal(left, cells):
            return np.where(states, first[0].numpy(), np.nan), np.where(cells, first[-1].numpy(), np.nan)
        cells = left
