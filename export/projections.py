"""LSTM layers with projections, for which ONNX has no operator, as layers without."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxprune.channels.arguments import bound
from fxprune.channels.rules.initial_states import zeros_behind
from fxprune.errors import ExportError
from fxprune.graph.text import describe

aten = torch.ops.aten


def is_projected(node: fx.Node) -> bool:
    """Whether an LSTM's state is smaller than that of its cell."""
    hidden, cell = bound(node)["hx"]
    return bool(hidden.meta["val"].shape[-1] != cell.meta["val"].shape[-1])


def replace_projected(graph: fx.Graph, node: fx.Node) -> None:
    """Let layers without projections compute what an LSTM with them does.

    The state is h = P s with s = o * tanh(c), and what reads it is W h = (W P) s: a layer without projection whose
    weight is W P computes s, and P s follows behind it. It starts with s = 0, as h must.

    Raises:
        ExportError: the state h starts with anything but zeros.
    """
    given = bound(node)
    hidden, cell = given["hx"]
    if zeros_behind(hidden) is None:
        raise ExportError(
            f"{describe(node)} has projections (proj_size) and an initial state that is given: ONNX has no operator "
            "for that. Let it start at zero, or have a hidden state of the cell's size (proj_size=0)."
        )
    layers = _Layers(graph, given)
    start = graph.call_function(aten.zeros_like.default, (cell,))
    data, states, cells = given["input"], list[fx.Node](), list[fx.Node]()
    for layer in range(given["num_layers"]):
        data, own_states, own_cell = layers.run(layer, data, start, cell)
        states += own_states
        cells.append(own_cell)
    results = data, layers.joined(states, 0), layers.joined(cells, 0)
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        graph.erase_node(user)


class _Layers:
    """The layers of a call, each as one call without projections."""

    def __init__(self, graph: fx.Graph, given: dict[str, Any]) -> None:
        self._call = graph.call_function
        self._given = given
        self._ways = 2 if given["bidirectional"] else 1
        self._step = 5 if given["has_biases"] else 3

    def run(self, layer: int, data: fx.Node, hidden: fx.Node, cell: fx.Node) -> tuple[fx.Node, list[fx.Node], fx.Node]:
        """The outputs of a layer, its last states by direction, and the last states of its cells."""
        first = layer * self._ways
        weights = [self._weights(first + way) for way in range(self._ways)]
        params = [each for own in weights for each in own[:-1]]
        start = [self._call(aten.slice.Tensor, (state, 0, first, first + self._ways)) for state in (hidden, cell)]
        options = (self._given["has_biases"], 1, 0.0, False, self._given["bidirectional"], self._given["batch_first"])
        result = self._call(aten.lstm.input, (data, start, params, *options))
        projections = [own[-1] for own in weights]
        parts = self._call(aten.chunk.default, (self._item(result, 0), self._ways, -1))
        outputs = [
            self._call(aten.linear.default, (self._item(parts, way), projection))
            for way, projection in enumerate(projections)
        ]
        last = [
            self._call(aten.linear.default, (self._part(self._item(result, 1), way), projection))
            for way, projection in enumerate(projections)
        ]
        return self.joined(outputs, -1), last, self._item(result, 2)

    def joined(self, parts: Sequence[fx.Node], dim: int) -> fx.Node:
        return parts[0] if len(parts) == 1 else self._call(aten.cat.default, (list(parts), dim))

    def _weights(self, index: int) -> list[fx.Node]:
        """The weights of one layer in one direction; what reads the state reads what is projected."""
        inputs, states, *biases, projection = self._given["params"][index * self._step : (index + 1) * self._step]
        return [inputs, self._call(aten.matmul.default, (states, projection)), *biases, projection]

    def _item(self, results: fx.Node, index: int) -> fx.Node:
        return self._call(operator.getitem, (results, index))

    def _part(self, states: fx.Node, way: int) -> fx.Node:
        return self._call(aten.slice.Tensor, (states, 0, way, way + 1))
