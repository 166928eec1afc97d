"""The weights of recurrent layers that read the state: readers of what the reference's states were one step before."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.channels.registry import REGISTRY
from fxprune.channels.rules.recurrent import Recurrent, RecurrentCell
from fxprune.graph.traced import TracedModule
from fxprune.prune.repair.finding import LeftAlone, Weights, Why, cell_reader, joined, own_weights_and_biases
from fxprune.prune.repair.layers import CellReader, Reader, ReaderCall, RecurrentReader


class _OfStates(Reader):
    """Weights that read a state.

    The states of the masked network come of the weights themselves, and of errors of all steps before. What is fitted
    reads those of the reference instead: its live units make up for those that are masked.
    """

    @property
    def key(self) -> Hashable:
        return self.node, type(self)

    @property
    def reads_reference(self) -> bool:
        return True


@dataclass(frozen=True, eq=False)
class StateReader(_OfStates, RecurrentReader):
    """All gates of each direction, a group each; of several layers the last one's."""

    def told_by(self, call: ReaderCall) -> fx.Node:
        return call.node

    def table(self, weights: Sequence[Tensor]) -> Tensor:
        return torch.stack([*weights])

    def stored(self, table: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        return [*table]

    def received(self, call: ReaderCall, own: Mapping[fx.Node, Any], reference: Mapping[fx.Node, Any]) -> Tensor:
        states: Tensor = reference[call.node][0]
        return states

    def inputs_at(self, data: Tensor, places: tuple[Tensor, ...]) -> Tensor:
        rows: Tensor = data[places].unflatten(1, (self.sizes[0], self.sizes[2]))
        return rows.transpose(0, 1)


@dataclass(frozen=True, eq=False)
class CellStateReader(_OfStates, CellReader):
    """Those of a recurrent cell, over all steps."""

    def told_by(self, call: ReaderCall) -> fx.Node:
        assert call.state is not None
        return call.state

    def received(self, call: ReaderCall, own: Mapping[fx.Node, Any], reference: Mapping[fx.Node, Any]) -> Tensor:
        states: Tensor = reference[self.told_by(call)]
        return states


def find_states(traced: TracedModule, graph: fx.Graph) -> tuple[list[Reader], dict[fx.Node, LeftAlone]]:
    """The readers of states of a graph in its order, and why others are left alone."""
    weights = Weights(traced, graph)
    readers: list[Reader] = []
    alone: dict[fx.Node, LeftAlone] = {}
    for node in graph.nodes:
        call = REGISTRY.call(node) if node.op == "call_function" else None
        if not isinstance(call, Recurrent | RecurrentCell):
            continue
        if isinstance(call, Recurrent):
            found = _reader(weights, call)
        else:
            found = cell_reader(CellStateReader, weights, call, call.w_hh, call.b_hh)
        if isinstance(found, Reader):
            readers.append(found)
        else:
            alone[node] = LeftAlone(f"what reads the state of {node.name}", found.text)
    return joined(weights, readers, alone), alone


def _reader(weights: Weights, call: Recurrent) -> Reader | Why:
    directions = call.directions[-2 if call.bidirectional else -1 :]
    found = own_weights_and_biases(weights, ((each.states, each.state_bias) for each in directions))
    if isinstance(found, Why):
        return found
    names, biases, shapes = found
    return StateReader(call.node, call.data, names, biases, (len(names), *shapes[0]), None)
