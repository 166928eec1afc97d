"""Stacked recurrent layers as calls of one layer each, so that what an inner layer reads is a node's value."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxprune.channels.arguments import bound
from fxprune.channels.registry import REGISTRY
from fxprune.channels.rules.recurrent import Recurrent
from fxprune.channels.shapes import resized

aten = torch.ops.aten


def in_single_layers(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph of eval mode that computes the same layer by layer; the graph itself if nothing is stacked.

    Nodes keep their names. Dropout between the layers is off in eval mode.
    """
    if not any(map(_can_be_split, graph.nodes)):
        return graph
    found = copy.deepcopy(graph)
    for node in [each for each in found.nodes if _can_be_split(each)]:
        with found.inserting_before(node):
            results = _Stack(node).run()
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            found.erase_node(user)
        found.erase_node(node)
    return found


def _can_be_split(node: fx.Node) -> bool:
    """Whether a node is a stack of layers in eval mode whose results are taken one by one."""
    call = REGISTRY.call(node) if node.op == "call_function" else None
    if not isinstance(call, Recurrent) or call.num_layers == 1 or (bound(node)["train"] and bound(node)["dropout"]):
        return False
    return all(user.target is operator.getitem for user in node.users)


@dataclass(eq=False)
class _Stack:
    """A call of several layers.

    Attributes:
        node: the call. states: how many states it starts from.
    """

    node: fx.Node
    given: dict[str, Any] = field(init=False)
    starts: list[fx.Node] = field(init=False)
    ways: int = field(init=False)

    def __post_init__(self) -> None:
        self.given = bound(self.node)
        start = self.given["hx"]
        self.starts = [*start] if isinstance(start, list | tuple) else [start]
        self.ways = 2 if self.given["bidirectional"] else 1

    def run(self) -> list[fx.Node]:
        """The layers one after the other; returns the results of the whole."""
        data, last = self.given["input"], list[list[fx.Node]]()
        for layer in range(self.given["num_layers"]):
            data, *states = self._layer(layer, data)
            last.append(states)
        values = self.node.meta["val"][1:]
        ends = zip(zip(*last, strict=True), values, strict=True)
        return [data, *(self._call(aten.cat.default, ([*each], 0), value) for each, value in ends)]

    def _layer(self, layer: int, data: fx.Node) -> list[fx.Node]:
        first = layer * self.ways
        start = [
            self._call(aten.slice.Tensor, (state, 0, first, first + self.ways), self._of_layer(state.meta["val"]))
            for state in self.starts
        ]
        step = len(self.given["params"]) // (self.given["num_layers"] * self.ways)
        params = self.given["params"][first * step : (first + self.ways) * step]
        hidden: Any = start if isinstance(self.given["hx"], list | tuple) else start[0]
        options = self.given["has_biases"], 1, 0.0, False, self.given["bidirectional"], self.given["batch_first"]
        output, *states = self.node.meta["val"]
        values = output, *map(self._of_layer, states)
        call = self._call(self.node.target, (data, hidden, params, *options), values)
        return [self._call(operator.getitem, (call, place), value) for place, value in enumerate(values)]

    def _of_layer(self, states: Any) -> Any:
        return resized(states, (self.ways, *states.shape[1:]))

    def _call(self, target: Any, arguments: Sequence[Any], value: Any) -> fx.Node:
        node = self.node.graph.call_function(target, tuple(arguments))
        node.meta = {name: kept for name, kept in self.node.meta.items() if name != "val"} | {"val": value}
        return node
