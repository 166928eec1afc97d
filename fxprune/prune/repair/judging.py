"""How far the outputs of a network are off on held-back samples, as it was and refitted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from fxprune.graph.interpretation import run
from fxprune.prune.repair.alive import AliveInterpreter
from fxprune.prune.repair.batches import Piece
from fxprune.prune.repair.layers import Reader
from fxprune.prune.repair.shelf import Shelf

Tensors = Callable[[str], Tensor]
Biases = Mapping[fx.Node, tuple[Reader, Tensor]]

MOST_TRIED = 32  # parts of a sweep that are taken back to see whether the outputs are better then


class Judge:
    """Compares outputs of a graph with those of its reference.

    Args:
        graph: what both compute. reference: the tensors of the reference, by what `get_attr` nodes read.
        shelf: where inputs and the reference's outputs lie; nothing else may be on it.
    """

    def __init__(self, graph: fx.Graph, reference: Tensors, shelf: Shelf) -> None:
        self._graph, self._reference, self._shelf = graph, reference, shelf
        self._counts: list[Tensor | None] = []

    def add(self, piece: Piece) -> None:
        """Judge by one more piece."""
        outputs = run(self._graph, self._reference, piece.inputs)
        self._shelf.put(len(self._counts), {"inputs": piece.inputs, "outputs": outputs})
        self._counts.append(piece.counts)

    def error(self, tensors: Tensors, biases: Biases) -> float:
        """Squared differences from the reference, relative to the energy of its outputs, a mean over the outputs.

        Args:
            tensors: of the network, by what `get_attr` nodes read. biases: what is added to the outputs of calls.
        """
        sums: dict[int, Tensor] = {}
        for number, counts in enumerate(self._counts):
            state = self._shelf.take(number)
            self._shelf.put(number, state)
            interpreter = _Shifted(self._graph, tensors, biases)
            found = pytree.tree_leaves(interpreter.run(*state["inputs"], enable_io_processing=False))
            for place, both in enumerate(zip(found, state["outputs"], strict=True)):
                if isinstance(both[1], Tensor) and both[1].is_floating_point():
                    lost, energy = (float(each.sum()) for each in _counted(*both, counts))
                    sums[place] = sums.get(place, torch.zeros(2, dtype=torch.float64)) + torch.tensor([lost, energy])
        shares = [lost / energy if energy else lost for lost, energy in (each.tolist() for each in sums.values())]
        return sum(shares) / len(shares) if shares else 0.0


class _Shifted(AliveInterpreter):
    """Adds to what calls give the biases that they do not have yet."""

    def __init__(self, graph: fx.Graph, tensors: Tensors, biases: Biases) -> None:
        super().__init__(graph, tensors)
        self._biases = biases

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        value = super().run_node(n)
        if n not in self._biases:
            return value
        reader, bias = self._biases[n]
        return reader.shifted(value, bias)


def _counted(value: Tensor, reference: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """The squared differences, and the squares of the reference, where it is finite and rows count."""
    value, reference = value.double(), reference.double()
    taken = torch.isfinite(reference)
    if counts is not None and tuple(counts.shape) == tuple(reference.shape[: counts.dim()]):
        taken &= counts.to(taken.device).reshape(*counts.shape, *[1] * (reference.dim() - counts.dim()))
    lost = (value - reference)[taken].square().nan_to_num(nan=torch.inf)
    return lost, reference[taken].square()


def parts(readers: Sequence[Reader]) -> Iterator[list[Reader]]:
    """Readers from the last to the first, one after the other, or some at once where they are many."""
    size = -(-len(readers) // MOST_TRIED)
    for end in range(len(readers), 0, -size):
        yield [*readers[max(end - size, 0) : end]]
