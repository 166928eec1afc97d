"""Recurrent layers, and the cells of single steps."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx, nn

from fxprune.channels.axes import Axis, sizes_of
from fxprune.channels.edits import Pending, SetArguments
from fxprune.channels.readers import EqualCounts, MoreCells
from fxprune.channels.registry import REGISTRY, Cost, OperatorCall, register
from fxprune.channels.rules.constant_units import GRU, LSTM, RELU, TANH, Kind
from fxprune.channels.rules.hidden_units import Direction, Units, beside, relate_direction
from fxprune.channels.rules.initial_states import InitialStates
from fxprune.channels.values import Stack, Value
from fxprune.channels.walk import Result, Walk

aten = torch.ops.aten

_KINDS: Mapping[Any, Kind] = {
    aten.lstm: LSTM, aten.gru: GRU, aten.rnn_tanh: TANH, aten.rnn_relu: RELU,
    aten.lstm_cell: LSTM, aten.gru_cell: GRU, aten.rnn_tanh_cell: TANH, aten.rnn_relu_cell: RELU,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Call(OperatorCall):
    """What layers and cells have in common.

    Attributes:
        hx: the states at the start, a list [h, c] of an LSTM.
    """

    data: fx.Node
    hx: Any

    @property
    def kind(self) -> Kind:
        return _KINDS[REGISTRY.model(self.node.target).overloadpacket]

    @property
    @abc.abstractmethod
    def directions(self) -> list[Direction]:
        """The weights by layer and direction."""

    @property
    def is_lstm(self) -> bool:
        return isinstance(self.hx, list | tuple)

    def _depends_on_input(self, walk: Walk) -> bool:
        weights = [node for direction in self.directions for node in direction.nodes]
        return walk.facts and not all(walk.value(node).stored for node in weights)

    def _initial(self, walk: Walk, rows: int) -> list[InitialStates]:
        operands = self.hx if self.is_lstm else [self.hx]
        return [InitialStates.of(walk, self.node, operand, rows) for operand in operands]

    def _cut_states(self, walk: Walk, initial: Sequence[InitialStates], units: Sequence[Units]) -> None:
        """Record what removal changes in the states at the start."""
        vectors = [each.states for each in units], [each.cells for each in units]
        edited = [states.edited(own) for states, own in zip(initial, vectors, strict=False)]
        if any(isinstance(state, Pending) for state in edited):
            walk.edits.append(SetArguments(self.node, {"hx": edited if self.is_lstm else edited[0]}))

    def costs(self, env: Mapping[fx.Node, Result]) -> Sequence[Cost]:
        """One product a weight and step."""
        steps = float(math.prod(sizes_of(self.data)[:-1]))
        weights = [node for direction in self.directions for node in direction.nodes]
        matrices = [weight for weight in weights if len(sizes_of(weight)) == 2]
        return [Cost(steps * math.prod(sizes_of(weight)), _axes(env.get(weight))) for weight in matrices]


def _axes(value: Result) -> tuple[Axis, ...]:
    return value.axes if isinstance(value, Value) else ()


@register(aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
@dataclass(frozen=True, eq=False)
class Recurrent(_Call):
    """Layers of hidden units in one direction or both, over all steps of a sequence.

    All layers and directions of a call have equally many units.
    """

    params: list[fx.Node]
    has_biases: bool
    num_layers: int
    bidirectional: bool
    modules: ClassVar = (nn.RNNBase,)

    @property
    def directions(self) -> list[Direction]:
        count = self.num_layers * (2 if self.bidirectional else 1)
        step = len(self.params) // count
        return [self._direction(self.params[i : i + step]) for i in range(0, count * step, step)]

    def _direction(self, params: Sequence[fx.Node]) -> Direction:
        inputs, states, *rest = params
        biases = rest[:2] if self.has_biases else (None, None)
        projection = rest[2 if self.has_biases else 0 :]
        return Direction(inputs, states, *biases, *projection)

    @property
    def first_layer(self) -> list[tuple[fx.Node, fx.Node | None]]:
        """The weight and the bias of the input, for each direction."""
        return [(each.inputs, each.input_bias) for each in self.directions[: 2 if self.bidirectional else 1]]

    def relate(self, walk: Walk) -> Result:
        if self._depends_on_input(walk):
            return walk.refuse(self.node, "weights that depend on the input")
        directions = self.directions
        data = walk.value(self.data)
        data = walk.blur(self.node, data, range(data.rank - 1), "steps of a recurrent layer")
        data = walk.flat(self.node, data, data.rank - 1)
        initial = self._initial(walk, len(directions))
        around, units = [Axis.plain(size) for size in walk.shape(self.node)[:-1]], list[Units]()
        beside_each_other = 2 if self.bidirectional else 1
        for index, direction in enumerate(directions):
            start = [states.states[index] for states in initial]
            units.append(relate_direction(walk, self.node, self.kind, direction, data, start))
            if (index + 1) % beside_each_other == 0:
                data = beside(units[-beside_each_other:], around)
        self._keep_equal(walk, units)
        self._cut_states(walk, initial, units)
        batch = [Axis.plain(size) for size in self.node.meta["val"][1].shape[1:-1]]
        results = [data, Stack.of([each.state(batch) for each in units])]
        return [*results, Stack.of([each.cell(batch) for each in units])] if self.is_lstm else results

    def _keep_equal(self, walk: Walk, units: Sequence[Units]) -> None:
        if self.directions[0].projection is not None:
            walk.more.extend(MoreCells(self.node, each.cells, each.states) for each in units)
        if len(units) == 1:
            return
        walk.equal.append(EqualCounts(self.node, np.stack([each.states for each in units])))
        if self.directions[0].projection is not None:
            walk.equal.append(EqualCounts(self.node, np.stack([each.cells for each in units])))

    @classmethod
    def module_sizes(cls, module: nn.Module) -> dict[str, Any]:
        assert isinstance(module, nn.RNNBase)
        sizes = {name: tuple(tensor.shape) for name, tensor in module.named_parameters(recurse=False)}
        units = sizes["weight_hh_l0"][0] // {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
        projected = {"proj_size": sizes["weight_hr_l0"][0]} if module.proj_size else {}
        return {"hidden_size": units, "input_size": sizes["weight_ih_l0"][1], **projected}


@register(aten.lstm_cell, aten.gru_cell, aten.rnn_tanh_cell, aten.rnn_relu_cell)
@dataclass(frozen=True, eq=False)
class RecurrentCell(_Call):
    """One step of a layer; the states of a loop are carried from call to call."""

    w_ih: fx.Node
    w_hh: fx.Node
    b_ih: fx.Node | None = None
    b_hh: fx.Node | None = None
    modules: ClassVar = (nn.RNNCellBase,)

    @property
    def directions(self) -> list[Direction]:
        return [Direction(self.w_ih, self.w_hh, self.b_ih, self.b_hh)]

    def relate(self, walk: Walk) -> Result:
        if self._depends_on_input(walk):
            return walk.refuse(self.node, "weights that depend on the input")
        data = walk.value(self.data)
        data = walk.blur(self.node, data, range(data.rank - 1), "samples of a recurrent cell")
        data = walk.flat(self.node, data, data.rank - 1)
        initial = self._initial(walk, 1)
        start = [states.states[0] for states in initial]
        units = relate_direction(walk, self.node, self.kind, self.directions[0], data, start)
        self._cut_states(walk, initial, [units])
        batch = [Axis.plain(size) for size in walk.shape(self.node)[:-1]]
        return [units.state(batch), units.cell(batch)] if self.is_lstm else units.state(batch)

    @classmethod
    def module_sizes(cls, module: nn.Module) -> dict[str, Any]:
        assert isinstance(module, nn.RNNCellBase)
        return {"hidden_size": module.weight_hh.shape[1], "input_size": module.weight_ih.shape[1]}
