"""What the output loses when units of one group go, measured on samples that no moment was made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from fxprune.errors import PruningError
from fxprune.graph.interpretation import Interpreter
from fxprune.graph.names import tensor_at
from fxprune.graph.text import describe
from fxprune.graph.traced import TracedModule
from fxprune.prune.repair.batches import Piece
from fxprune.prune.repair.finite import origin_of_non_finite
from fxprune.prune.repair.waves import Layout
from fxprune.prune.sensitivity.distances import OutputDistance
from fxprune.torch_internals import pytree_info

Environment = dict[fx.Node, Any]
Tensors = Mapping[str, Tensor]


@dataclass(eq=False)
class _Run:
    """A dense run of one piece that is under way."""

    piece: Piece
    env: Environment = field(default_factory=dict)
    outputs: list[Any] = field(default_factory=list)


class Forks:
    """Dense runs over a graph, from which runs with other parameters branch off where these are first read.

    Args:
        traced: the module. graph: its eval graph. pieces: what it is run on. distance: of outputs.
    """

    def __init__(
        self, traced: TracedModule, graph: fx.Graph, pieces: Sequence[Piece], distance: OutputDistance
    ) -> None:
        self._traced, self._graph, self._distance = traced, graph, distance
        self._nodes = list(graph.nodes)
        self._at = {node: number for number, node in enumerate(self._nodes)}
        ends = graph.find_nodes(op="output")
        self._is_strict = Layout.of(graph, ends, []).is_strict
        self._last = self._last_uses()
        self._done = 0
        self._runs = [_Run(piece) for piece in pieces]
        for run in self._runs:
            run.outputs = self._outputs(self._finished(dict(self._inputs(run.piece)), 0, {}))
            run.env = {} if self._is_strict else dict(self._inputs(run.piece))
        unchanged = distance.sums()
        for run in self._runs:
            self._add(unchanged, run, run.outputs)
        self._nothing = distance.mean(unchanged)  # a function of the user may be anything there, such as an entropy

    def start_of(self, names: Sequence[str]) -> int:
        """The number of the first node that reads some parameters; runs branch off there."""
        read = [node for node in self._graph.find_nodes(op="get_attr") if str(node.target) in set(names)]
        return min((self._at[user] for node in read for user in node.users), default=len(self._nodes))

    def losses(self, changed: Tensors, start: int) -> float:
        """The mean distance of the outputs with other parameters; `start` may not be less than in an earlier call.

        Raises:
            PruningError: it is NaN or inf.
        """
        if not self._is_strict:
            self._advance(start)
        found = self._distance.sums()
        for run in self._runs:
            begin = 0 if self._is_strict else self._done
            env = dict(self._inputs(run.piece)) if self._is_strict else dict(run.env)
            outputs = self._outputs(self._finished(env, begin, changed))
            self._add(found, run, outputs)
        loss = self._distance.mean(found) - self._nothing
        if not math.isfinite(loss):
            raise PruningError(self._why_not_finite())
        return loss

    def _add(self, sums: list[Tensor], run: _Run, outputs: Sequence[Any]) -> None:
        piece = run.piece
        self._distance.add(sums, outputs, run.outputs, piece.counts, self._structure, piece.samples)

    def _why_not_finite(self) -> str:
        for run in self._runs:
            ends = [*self._inputs(run.piece).items(), *zip(self._distance.leaves, run.outputs, strict=True)]
            for leaf, value in ends:
                if isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
                    interpreter = Interpreter(self._graph, lambda name: tensor_at(self._traced, name), keep=True)
                    interpreter.run(*run.piece.inputs, enable_io_processing=False)
                    origin = origin_of_non_finite(leaf, interpreter.env)
                    return f"NaN or inf come up at {describe(origin)}. Check the batches, and the weights."
        return (
            f"the distance ({self._distance}) of the outputs without some channels is NaN or inf. Check the function, "
            "or give another one."
        )

    def _inputs(self, piece: Piece) -> Environment:
        places = self._graph.find_nodes(op="placeholder")
        values = [each.clone() if self._is_strict and isinstance(each, Tensor) else each for each in piece.inputs]
        return dict(zip(places, values, strict=True))

    def _advance(self, start: int) -> None:
        """Let the dense runs go on to a node."""
        for run in self._runs:
            self._span(run.env, self._done, start, {})
        self._done = max(self._done, start)

    def _finished(self, env: Environment, start: int, changed: Tensors) -> Environment:
        self._span(env, start, len(self._nodes), changed)
        return env

    def _span(self, env: Environment, start: int, stop: int, changed: Tensors) -> None:
        """Run some nodes; values that no later node needs are dropped."""

        def tensor(name: str) -> Tensor:
            return changed[name] if name in changed else tensor_at(self._traced, name)

        interpreter = Interpreter(self._graph, tensor, keep=True)
        interpreter.env = env
        for number in range(start, stop):
            node = self._nodes[number]
            if node.op in ("placeholder", "output"):
                continue
            if node.op == "get_attr":
                env[node] = interpreter.run_node(node)
                continue
            for operand in node.all_input_nodes:
                if operand.op == "get_attr":
                    env[operand] = interpreter.run_node(operand)
            if self._is_strict:
                env[node] = interpreter.run_node(node)
            else:
                interpreter.run_apart(node)
            for operand in node.all_input_nodes:
                if self._last[operand] <= number:
                    env.pop(operand, None)

    def _last_uses(self) -> dict[fx.Node, int]:
        return {node: max((self._at[user] for user in node.users), default=-1) for node in self._nodes}

    def _outputs(self, env: Environment) -> list[Any]:
        return [env[leaf] for leaf in self._distance.leaves]

    @property
    def _structure(self) -> Callable[[Sequence[Any]], Any]:
        """From flat outputs to what the module returns."""
        (output,) = self._graph.find_nodes(op="output")
        leaves, spec = pytree.tree_leaves(output.args), pytree_info(self._graph).out_spec
        assert spec is not None

        def structured(values: Sequence[Any]) -> Any:
            given = iter(values)
            return pytree.tree_unflatten([next(given) if isinstance(leaf, fx.Node) else leaf for leaf in leaves], spec)

        return structured
