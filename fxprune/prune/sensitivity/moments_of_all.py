"""Moments of what readers receive where a module is spread over processes: each runs its share of the pieces.

Every process makes the graph and the readers of its own copy without values, and gets values when its operators read
them, at the same time as the others. The sums come together on the first one, layer by layer.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxprune import driver
from fxprune.borrowing import Borrowed, lender
from fxprune.channels.computed_weights import held_values, with_plain_weights
from fxprune.graph.mutation import draws
from fxprune.graph.spread_modules import hollow_copy
from fxprune.prune.repair.batches import Piece
from fxprune.prune.repair.finding import find
from fxprune.prune.repair.input_moments import InputMoments
from fxprune.prune.repair.layers import NormalizationReader, Reader
from fxprune.prune.repair.pieces import Pieces
from fxprune.prune.repair.products import Product
from fxprune.prune.repair.stacks import in_single_layers
from fxprune.serving import Serving
from fxprune.teams import Processes

_KEY = "the graph of moments"
_Operand = tuple[str, tuple[int, ...]]
_Reader = tuple[str, tuple[str, ...]] | tuple[str, _Operand, _Operand]


@dataclass(frozen=True)
class _Plan:
    """What the first process tells the others.

    Attributes:
        graph: a checksum. held: the parameters that hold what was computed from them.
        readers: of weights, by node and weights; of products, by node and operands.
        samples: how many there are. pieces: into how many they are cut.
        numbers, values: of the tensors that the graph reads, those that are lent and others.
    """

    graph: int
    held: list[str]
    readers: list[_Reader]
    samples: int
    pieces: int
    numbers: dict[str, int]
    values: dict[str, Tensor]


@dataclass(frozen=True)
class _Prepared:
    """What a process makes of its own copy for the first pass, and keeps for the others.

    Attributes:
        checksum: of the graph. nodes: by name. readers: by what is told of them, those of weights.
    """

    graph: fx.Graph
    checksum: int
    nodes: Mapping[str, fx.Node]
    readers: Mapping[_Reader, Reader]


@dataclass(frozen=True)
class _Own:
    """The graph and the readers that a process has made itself; on the first one the pieces, too."""

    graph: fx.Graph
    readers: Sequence[Reader | Product]
    pieces: Iterator[Piece]


def moments_over(
    graph: fx.Graph, tensors: Callable[[str], Tensor], readers: Sequence[Reader | Product], pieces: Pieces
) -> InputMoments:
    """The moments of what readers receive.

    Args:
        graph: the eval graph of a plain module, as `in_single_layers` gives it. tensors: its parameters and buffers.
        readers: of the graph. pieces: what it is run on.

    Raises:
        PruningError: NaN or inf come up; the message has the node.
    """
    if readers and len(pieces) and (found := _by_all(graph, tensors, readers, pieces)) is not None:
        return found
    moments = InputMoments(readers, pieces.samples[0])
    for piece in pieces if readers else ():
        moments.add(graph, tensors, piece)
    return moments


def _by_all(
    graph: fx.Graph, tensors: Callable[[str], Tensor], readers: Sequence[Reader | Product], pieces: Pieces
) -> InputMoments | None:
    """As above; None where this process does it by itself."""
    if not _runs_alike(graph) or any(isinstance(reader, NormalizationReader) for reader in readers):
        return None
    read = {str(node.target): tensors(str(node.target)) for node in graph.find_nodes(op="get_attr")}
    loans = lender(read.values())
    if loans is None:
        return None
    numbers = {name: loans.number_of(tensor) for name, tensor in read.items() if isinstance(tensor, Borrowed)}
    try:
        values = {name: tensor.cpu() for name, tensor in read.items() if name not in numbers}
        plan = _Plan(
            _checksum(graph),
            held_values(graph),
            [*map(_told, readers)],
            pieces.samples[0],
            len(pieces),
            numbers,
            values,
        )
        return loans.worked(_carried_out, plan, _Own(graph, readers, iter(pieces)))
    finally:
        for number in numbers.values():
            loans.release(number)


def _runs_alike(graph: fx.Graph) -> bool:
    """Whether all that run a graph read its tensors at the same time: nothing is drawn, or decided by values."""
    return all(
        isinstance(node.meta.get("val"), Tensor) if node.op == "get_attr" else not draws(node) for node in graph.nodes
    )


def _checksum(graph: fx.Graph) -> int:
    return zlib.crc32("\n".join(node.format_node() or "" for node in graph.nodes).encode())


def _told(reader: Reader | Product) -> _Reader:
    if isinstance(reader, Product):
        operands = [(node.name, order) for node, order in (reader.left, reader.right)]
        return reader.node.name, operands[0], operands[1]
    return reader.node.name, reader.weights


def _carried_out(serving: Serving, plan: _Plan, own: _Own | None = None) -> InputMoments | None:
    """What every process does; the sums are on the first one. None where one has another graph."""
    return Processes(serving).carried_out(lambda team: _added(team, plan, own))


@torch.no_grad()
def _added(team: Processes, plan: _Plan, own: _Own | None) -> InputMoments | None:
    own = _made(team, plan) if own is None else own
    if not team.same(all(team.of_all(own is not None))):
        return None
    assert own is not None
    moments = InputMoments(own.readers, plan.samples, team)
    tensors = team.tensors(plan.numbers, plan.values)
    for begin in range(0, plan.pieces, team.count):
        left = plan.pieces - begin
        piece = team.dealt(own.pieces)
        moments.add(own.graph, tensors, piece, is_counted=team.place < left)
    return moments


def _made(team: Processes, plan: _Plan) -> _Own | None:
    """The graph and the readers of this process's own copy; None where they are not those of the first one."""
    if _KEY not in team.prepared:
        team.prepared[_KEY] = _prepared(team, plan)
    there: _Prepared = team.prepared[_KEY]
    if there.checksum != plan.graph:
        return None
    readers: list[Reader | Product] = []
    for told in plan.readers:
        if len(told) == 3:
            name, *operands = told
            factors = ((there.nodes[operand], order) for operand, order in operands)
            readers.append(Product(there.nodes[name], *factors))
        elif told in there.readers:
            readers.append(there.readers[told])
        else:
            return None
    return _Own(there.graph, readers, iter(()))


def _prepared(team: Processes, plan: _Plan) -> _Prepared:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = with_plain_weights(driver.plain_view(hollow_copy(team.module)), plan.held)
    graph = in_single_layers(plain.graphs["eval"])
    nodes = {node.name: node for node in graph.nodes}
    return _Prepared(graph, _checksum(graph), nodes, {_told(reader): reader for reader in find(plain, graph)[0]})
