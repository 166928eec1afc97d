"""Second moments of what readers receive, over many batches, in as many passes as fit in memory."""

from __future__ import annotations

import contextlib
import itertools
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
from fxprune.prune.repair.moments import Moments, Origin
from fxprune.prune.repair.products import Product
from fxprune.prune.repair.rows import Rows
from fxprune.teams import Alone, Team

# numbers of 8 bytes that moments of one pass take at most
MOST_MOMENTS = 2**28
# of a reader: a matrix of more squared takes a gigabyte, and a fit needs some of them
MOST_COLUMNS = 10_000


class InputMoments:
    """Of several readers, by what they read.

    Args:
        readers: whose inputs. samples: how many there will be.
        team: the processes that add pieces side by side, as many at a time as there are; the first one has the sums,
            which have the same bits as those of one process.

    Attributes:
        found: by a reader's key the moments of its inputs; by the node of a product its channels' gram matrix.
    """

    def __init__(self, readers: Sequence[Reader | Product], samples: int, team: Team | None = None) -> None:
        self._team: Team = Alone() if team is None else team
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
        self._origins: dict[object, Origin] = {}

    def add(self, graph: fx.Graph, tensors: Callable[[str], Tensor], piece: Piece, *, is_counted: bool = True) -> None:
        """Run a piece, as far as a reader needs, and add what readers receive.

        Args:
            graph: what runs. tensors: its parameters and buffers. piece: of this process.
            is_counted: False for one that runs because others do, and adds nothing.

        Raises:
            PruningError: NaN or inf come up; the message has the node. In a team, on all processes.
        """
        problem: str | None = None
        wanted: dict[fx.Node, list[tuple[object, fx.Node]]] = {}
        for key, (reader, _) in self._readers.items():
            for call in reader.calls:
                wanted.setdefault(call.node, []).append((key, call.data))

        def is_usable(node: fx.Node, reader: str) -> bool:
            nonlocal problem
            if problem is None and not is_finite(interpreter.env[node]):
                problem = (
                    f"NaN or inf come up at {describe(node)}, which {reader} reads. Check the batches, and the weights."
                )
            return is_counted and problem is None

        def watch(node: fx.Node, _: object) -> None:
            for key, data in wanted.get(node, ()):
                usable = is_usable(data, repr(self._readers[key][0].name))
                self._add(key, interpreter.env[data], piece, usable)
            if (product := self._products.get(node)) is not None:
                operands = [operand for operand, _ in (product.left, product.right)]
                usable = all([is_usable(operand, describe(node)) for operand in operands])
                values = [interpreter.env[operand] for operand in operands]
                for gram in self._team.of_all(product.gram(values, piece.counts) if usable else None):
                    self.found[node] = self.found[node] if gram is None else self.found[node] + gram
            if node is last:
                raise _Done

        last = max([*wanted, *self._products])
        interpreter = Interpreter(graph, tensors, watch=watch)
        with contextlib.suppress(_Done):
            interpreter.run(*piece.inputs, enable_io_processing=False)
        if (found := self._team.first_of(problem if is_counted else None)) is not None:
            raise PruningError(found)

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

    def _add(self, key: object, data: Tensor, piece: Piece, is_usable: bool) -> None:
        reader, rows = self._readers[key]
        if rows.stride is None:
            rows.stride = self._team.same(rows.stride_by(data, piece))
        parts = (
            (_wide(reader.inputs_at(data, places)) for places in rows.places(data, piece)) if is_usable else iter(())
        )
        own = [*itertools.islice(parts, 1)]
        if key not in self._origins:
            origin = self._team.first_of(Origin.of(own[0]) if own else None)
            if origin is None:
                return
            self._origins[key] = origin
        origin = self._origins[key]
        sums = self.found[key] if self._team.is_alone else Moments([])
        for inputs in itertools.chain(own, parts):
            sums.add(inputs, [], [], origin.shift, origin.steps)
        if not self._team.is_alone:
            self._join(key, sums, origin)

    def _join(self, key: object, sums: Moments, origin: Origin) -> None:
        """Add what each process has found."""
        if not sums.count:
            sums.add(origin.shift[:, None][:, :0], [], [], origin.shift, origin.steps)
        totals = torch.cat([sums.total.flatten(), sums.total.new_tensor([sums.count])])
        self._team.sum(totals)
        self._team.sum(sums.square)
        if self._team.is_first:
            sums.total, sums.count = totals[:-1].view(sums.total.shape), int(totals[-1])
            own = self.found[key]
            if own.count:
                own.join(sums)
            else:
                self.found[key] = sums


def _wide(inputs: Tensor) -> Tensor:
    return inputs if inputs.dtype == torch.float64 else inputs.float()


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
