"""The masked network and its reference, run side by side over pieces of batches, a wave at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from fxprune.graph.interpretation import Interpreter
from fxprune.prune.repair.alive import AliveInterpreter
from fxprune.prune.repair.finding import Stream
from fxprune.prune.repair.layers import Reader
from fxprune.prune.repair.shelf import State
from fxprune.prune.repair.waves import Layout, Wave

Environment = dict[fx.Node, Any]
Tensors = Callable[[str], Tensor]


class _Behind(Environment):
    """The reference's values; those that are the same in both networks stand with the masked one's."""

    def __init__(self, own: Mapping[fx.Node, Any], others: Environment) -> None:
        super().__init__(own)
        self._others = others

    def __missing__(self, node: fx.Node) -> Any:
        return self._others[node]

    def __contains__(self, node: object) -> bool:
        return super().__contains__(node) or node in self._others


class Pair:
    """Two networks of one graph.

    Args:
        graph: what both compute.
        layout: which nodes run.
        waves: in which order.
        tensors, references: the parameters and buffers of the masked network and of its reference, by name.
        unmasked: the products of parameters with masks -> what the reference has there instead.
        streams: what the outputs of readers are added to, by their calls.

    Attributes:
        biases: by a call, its reader, and the bias [groups, outputs] that its output has beside what the graph adds.
    """

    def __init__(
        self,
        graph: fx.Graph,
        layout: Layout,
        waves: Sequence[Wave],
        tensors: Tensors,
        references: Tensors,
        unmasked: Mapping[fx.Node, fx.Node],
        streams: Mapping[fx.Node, Stream],
    ) -> None:
        self.layout, self.waves, self.unmasked = layout, waves, unmasked
        self.places = graph.find_nodes(op="placeholder")
        self._current = AliveInterpreter(graph, tensors, keep=True)
        self._reference = Interpreter(graph, references, keep=True)
        self._streams, self._fixed = streams, frozenset(layout.fixed)
        self.biases: dict[fx.Node, tuple[Reader, Tensor]] = {}
        self._last = self._last_waves()
        self._nodes = {node.name: node for node in layout.moving}

    def _last_waves(self) -> dict[tuple[str, fx.Node], int]:
        """The number of the last wave that needs a value of one of the networks."""
        last: dict[tuple[str, fx.Node], int] = {}
        for number, wave in enumerate(self.waves):
            fits = wave.fits(self._streams)
            for node in (*_inputs([*wave.current, *wave.tried]), *fits):
                last["current", node] = number
            for node in (*_inputs([*wave.reference, *wave.tried]), *fits):
                last["reference" if node in self.layout.differing else "current", node] = number
        return last

    def start(self, inputs: Sequence[Any]) -> State:
        """The state of a piece before the first wave."""
        found = {}
        for node, value in zip(self.places, inputs, strict=True):
            if node.name not in self._nodes:
                continue
            if self.layout.is_strict and isinstance(value, Tensor):
                found[f"reference {node.name}"] = value.clone()
                value = value.clone()
            found[f"current {node.name}"] = value
        return found

    def fixed(self, number: int) -> tuple[Environment, Environment]:
        """What a wave needs that depends on parameters alone, in both networks, as the parameters are now."""
        current = self._current.env = {}
        reference = self._reference.env = _Behind({}, current)
        for node in self._fixed_nodes(self.waves[number]):
            self._step(self._current, node)
            if node in self.layout.differing:
                self._step(self._reference, node)
        return current, reference

    def _fixed_nodes(self, wave: Wave) -> list[fx.Node]:
        pending = [*_inputs([*wave.current, *wave.reference, *wave.tried]), *wave.fits(self._streams)]
        found: set[fx.Node] = set()
        while pending:
            node = pending.pop()
            if node in self._fixed and node not in found:
                found.add(node)
                pending += node.all_input_nodes
        return sorted(found)

    def run(
        self, number: int, state: State, fixed: tuple[Environment, Environment], *, keep: bool = False
    ) -> tuple[Environment, Environment]:
        """Run a wave on the state of a piece; returns the values of both networks that are needed still, or all."""
        wave = self.waves[number]
        current: Environment = dict(fixed[0])
        reference = _Behind(fixed[1], current)
        for key, value in state.items():
            network, _, name = key.partition(" ")
            (current if network == "current" else reference)[self._nodes[name]] = value
        self._current.env, self._reference.env = current, reference
        runs, ahead = set(wave.current), set(wave.reference)
        order = sorted(runs | ahead)
        ends = {node: run for run in order for node in run.all_input_nodes if node.name in self._nodes}
        fits = wave.fits(self._streams).union(_inputs(wave.tried))
        for run in order:
            if run in runs:
                self._step(self._current, run)
            if run in ahead:
                self._step(self._reference, run)
            for node in run.all_input_nodes:
                if not keep and ends.get(node) is run and node not in fits:
                    self._drop(node, number, current, reference)
        return current, reference

    def tried(
        self, number: int, current: Environment, reference: Environment, *, keep: bool = False
    ) -> tuple[Environment, Environment]:
        """The values of both networks after what a wave runs for its fits alone; what was given stays as it is."""
        wave = self.waves[number]
        if not wave.tried:
            return current, reference
        own: Environment = dict(current)
        other = _Behind(dict(reference), own)
        self._current.env, self._reference.env = own, other
        needed = wave.fits(self._streams).union(call.node for reader in wave.readers for call in reader.calls)
        ends = {node: run for run in wave.tried for node in run.all_input_nodes}
        for run in wave.tried:
            self._step(self._current, run)
            if run in self.layout.differing:
                self._step(self._reference, run)
            for node in run.all_input_nodes:
                if not keep and ends[node] is run and node not in needed:
                    own.pop(node, None)
                    other.pop(node, None)
        return own, other

    def _drop(self, node: fx.Node, number: int, current: Environment, reference: Environment) -> None:
        for network, values in (("current", current), ("reference", reference)):
            if self._last.get((network, node), -1) <= number:
                values.pop(node, None)

    def kept(self, number: int, current: Environment, reference: Environment) -> State:
        """The state of a piece after a wave: what later waves need."""
        found = {}
        for network, values in (("current", current), ("reference", reference)):
            for node, value in values.items():
                if self._last.get((network, node), -1) > number and node.name in self._nodes:
                    found[f"{network} {node.name}"] = value
        return found

    def _step(self, interpreter: Interpreter, node: fx.Node) -> None:
        """Run one node of one network."""
        env = interpreter.env
        if interpreter is self._reference and node in self.unmasked:
            env[node] = env[self.unmasked[node]]
            return
        if self.layout.is_strict:
            env[node] = interpreter.run_node(node)
        else:
            interpreter.run_apart(node)
        if interpreter is self._current and node in self.biases:
            reader, bias = self.biases[node]
            env[node] = reader.shifted(env[node], bias)


def _inputs(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    return [each for node in nodes for each in node.all_input_nodes]
