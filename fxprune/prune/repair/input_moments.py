"""Second moments of what readers receive, over many batches, in as many passes as fit in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.errors import ArgumentError, PruningError
from fxprune.graph.interpretation import Interpreter
from fxprune.graph.text import describe
from fxprune.prune.repair.batches import Piece
from fxprune.prune.repair.finite import is_finite
from fxprune.prune.repair.layers import Reader
from fxprune.prune.repair.moments import Moments, first_shift
from fxprune.prune.repair.products import Product
from fxprune.prune.repair.rows import Rows

# numbers of 8 bytes that moments of one pass take at most
MOST_MOMENTS = 2**28
# of a reader: a matrix of more squared takes a gigabyte, and a fit needs some of them
MOST_COLUMNS = 10_000


class InputMoments:
    """Of several readers, by what they read.

    Args:
        readers: whose inputs. samples: how many there will be.

    Attributes:
        found: by a reader's key the moments of its inputs; by the node of a product its channels' gram matrix.
    """

    def __init__(self, readers: Sequence[Reader | Product], samples: int) -> None:
        self._readers: dict[object, tuple[Reader, Rows]] = {}
        self._products: dict[fx.Node, Product] = {}
        self.found: dict[object, Any] = {}
        for reader in readers:
            if isinstance(reader, Product):
                self._products[reader.node] = reader
                self.found[reader.node] = torch.zeros(())
            elif reader.key not in self._readers:
                self._readers[reader.key] = reader, Rows(reader, reader.sizes[2], samples)
                self.found[reader.key] = Moments([])
        self._shifts: dict[object, Tensor] = {}

    def add(self, graph: fx.Graph, tensors: Callable[[str], Tensor], piece: Piece) -> None:
        """Run a piece, as far as a reader needs, and add what readers receive.

        Raises:
            PruningError: NaN or inf come up; the message has the node.
        """
        wanted: dict[fx.Node, list[tuple[object, fx.Node]]] = {}
        for key, (reader, _) in self._readers.items():
            for call in reader.calls:
                wanted.setdefault(call.node, []).append((key, call.data))

        def value_of(node: fx.Node, reader: str) -> Tensor:
            value: Tensor = interpreter.env[node]
            if not is_finite(value):
                raise PruningError(
                    f"NaN or inf come up at {describe(node)}, which {reader} reads. Check the batches, and the weights."
                )
            return value

        def watch(node: fx.Node, _: object) -> None:
            for key, data in wanted.get(node, ()):
                self._add(key, value_of(data, repr(self._readers[key][0].name)), piece)
            if (product := self._products.get(node)) is not None:
                operands = [value_of(operand, describe(node)) for operand, _ in (product.left, product.right)]
                self.found[node] = self.found[node] + product.gram(operands, piece.counts)
            if node is last:
                raise _Done

        last = max([*wanted, *self._products])
        interpreter = Interpreter(graph, tensors, watch=watch)
        with contextlib.suppress(_Done):
            interpreter.run(*piece.inputs, enable_io_processing=False)

    def complete(self) -> dict[object, Any]:
        """What was found.

        Raises:
            ArgumentError: no row of a reader counts.
        """
        for key, (reader, _) in self._readers.items():
            if not self.found[key].count:
                raise ArgumentError(
                    f"weight leaves {reader.name!r} no row of the samples that are not held back; some are needed. "
                    "Give more samples, or let more rows count."
                )
        return self.found

    def _add(self, key: object, data: Tensor, piece: Piece) -> None:
        reader, rows = self._readers[key]
        for places in rows.places(data, piece):
            inputs = reader.inputs_at(data, places)
            inputs = inputs if inputs.dtype == torch.float64 else inputs.float()
            if key not in self._shifts:
                self._shifts[key] = first_shift(inputs)
            self.found[key].add(inputs, [], [], self._shifts[key])


class _Done(BaseException):
    """Nothing behind is needed; what is raised to stop a run is no error."""


def in_passes(readers: Sequence[Reader | Product]) -> Iterator[list[Reader | Product]]:
    """The readers in their order, in parts whose moments fit in memory; what is done with them later may keep them."""
    part: list[Reader | Product] = []
    keys, total = set[object](), 0
    for reader in readers:
        if isinstance(reader, Product):
            part.append(reader)
            continue
        groups, _, columns = reader.sizes
        size = 0 if reader.key in keys else groups * columns**2
        if part and total + size > MOST_MOMENTS:
            yield part
            part, keys, total = [], set(), 0
        part.append(reader)
        keys.add(reader.key)
        total += size
    if part:
        yield part
