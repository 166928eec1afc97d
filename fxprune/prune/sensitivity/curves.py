"""What the output loses when units of one group go, measured on samples that no moment was made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from fxprune.borrowing import lender
from fxprune.errors import PruningError
from fxprune.graph.interpretation import Interpreter
from fxprune.graph.names import tensor_at, tensors_of
from fxprune.graph.text import describe
from fxprune.graph.traced import TracedModule
from fxprune.prune.repair.batches import Piece
from fxprune.prune.repair.finite import origin_of_non_finite
from fxprune.prune.repair.waves import Layout
from fxprune.prune.sensitivity.distances import OutputDistance
from fxprune.torch_internals import pytree_info

_SHARE = 4  # of the module, which the tensors of runs that go side by side take

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
        tensors = tensors_of(traced).values()
        self._most_together = sum(each.nbytes for each in tensors) // _SHARE if lender(tensors) is not None else 0
        self._runs = [_Run(piece) for piece in pieces]
        for run in self._runs:
            env = dict(self._inputs(run.piece))
            self._span([env], 0, len(self._nodes), [{}])
            run.outputs = self._outputs(env)
            run.env = {} if self._is_strict else dict(self._inputs(run.piece))
        unchanged = distance.sums()
        for run in self._runs:
            self._add(unchanged, run, run.outputs)
        self._nothing = distance.mean(unchanged)  # a function of the user may be anything there, such as an entropy

    def start_of(self, names: Collection[str]) -> int:
        """The number of the first node that reads some parameters; runs branch off there."""
        read = [node for node in self._graph.find_nodes(op="get_attr") if str(node.target) in names]
        return min((self._at[user] for node in read for user in node.users), default=len(self._nodes))

    def losses(self, variants: Iterable[Tensors], start: int) -> list[float]:
        """The mean distance of the outputs with each of other parameters.

        Args:
            variants: parameters by name, made one after the other.
            start: where runs branch off; not less than in an earlier call.

        Raises:
            PruningError: it is NaN or inf.
        """
        if not self._is_strict:
            self._advance(start)
        return [loss for some in self._together(variants) for loss in self._losses(some)]

    def _together(self, variants: Iterable[Tensors]) -> Iterator[list[Tensors]]:
        """Those that run side by side: where parameters come from other processes, each comes once for all of them."""
        some, size = list[Tensors](), 0
        for variant in variants:
            some.append(variant)
            own = sum(tensor.nbytes for tensor in variant.values())
            size += own
            if size + own > self._most_together:
                yield some
                some, size = [], 0
        if some:
            yield some

    def _losses(self, variants: Sequence[Tensors]) -> list[float]:
        sums = [self._distance.sums() for _ in variants]
        for run in self._runs:
            begin = 0 if self._is_strict else self._done
            envs = [dict(self._inputs(run.piece)) if self._is_strict else dict(run.env) for _ in variants]
            self._span(envs, begin, len(self._nodes), variants)
            for found, env in zip(sums, envs, strict=True):
                self._add(found, run, self._outputs(env))
        losses = [self._distance.mean(found) - self._nothing for found in sums]
        if not all(map(math.isfinite, losses)):
            raise PruningError(self._why_not_finite())
        return losses

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
            self._span([run.env], self._done, start, [{}])
        self._done = max(self._done, start)

    def _span(self, envs: Sequence[Environment], start: int, stop: int, changed: Sequence[Tensors]) -> None:
        """Run some nodes, each on every environment with its own tensors; what no later node needs is dropped."""
        interpreters = []
        for env, own in zip(envs, changed, strict=True):
            interpreter = Interpreter(self._graph, _tensors(self._traced, own), keep=True)
            interpreter.env = env
            interpreters.append(interpreter)
        for number in range(start, stop):
            if self._nodes[number].op not in ("placeholder", "output"):
                for interpreter in interpreters:
                    self._step(interpreter, number)

    def _step(self, interpreter: Interpreter, number: int) -> None:
        node, env = self._nodes[number], interpreter.env
        if node.op == "get_attr":
            env[node] = interpreter.run_node(node)
            return
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


def _tensors(traced: TracedModule, changed: Tensors) -> Callable[[str], Tensor]:
    return lambda name: changed[name] if name in changed else tensor_at(traced, name)
