"""How far the output moves with what a reader gives: the metric in which errors of readers count.

A small error e of what a reader gives moves the network's output by J e, and costs e^T J^T D J e / 2, where D is the
second derivative of the distance of outputs. G, the mean of J^T D J, is the second moment of gradients: of D^(1/2) z
times the output, with z drawn normal, for each sample once (Hutchinson, "A stochastic estimator of the trace of the
influence matrix", 1990). Inputs and gradients are taken to be independent, so that the error of weights E costs
tr(G E H E^T): Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature" (2015),
https://arxiv.org/abs/1503.05671. But for their lengths: in H, a row counts by the square of the gradient there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph.interpretation import Interpreter, without_gradient
from fxprune.prune.repair.batches import Batches, Piece
from fxprune.prune.repair.layers import Reader
from fxprune.prune.repair.moments import add_products
from fxprune.prune.repair.pieces import Pieces
from fxprune.prune.repair.rows import Rows
from fxprune.prune.sensitivity.distances import OutputDistance

# of the samples that moments are made from one in so many, but no fewer, and no more
_SHARE, _FEWEST, _MOST = 4, 32, 128
_FIRST = 8  # that run before the others
_MOST_BYTES = 2**29  # of values that are kept for the way back
_DRAWN = 0.1  # where G has hardly any rows, its share of the identity
_AHEAD = 2.0  # times as many rows as came so far may still come
_MOST_OUTPUTS = 4096  # of a reader: a matrix of more squared takes too long to factorize
# of what torch says where there is no way back through an operator
_WAY_BACK = ("derivative", "autograd", "backward", "gradient computation", "differentiation", "inplace", "in-place")

Inputs = Sequence[tuple[Tensor, tuple[Tensor, ...]]]  # rows of a reader's inputs, and their places


@dataclass(frozen=True, eq=False)
class Metric:
    """How errors of one reader count.

    Attributes:
        root: [groups, outputs, outputs], L, where G = L L^T.
        square: [groups, columns, columns], the second moment of the inputs, a mean over rows, weighted by the squares
            of the gradients there; about the mean where a bias takes that up.
    """

    root: Tensor
    square: Tensor

    def mixed(self, group: int, square: Tensor) -> Tensor:
        """What H is taken to be in a group: half of it weighted, the other half, `square`, of all samples, not."""
        weighted = self.square[group]
        scale = weighted.diagonal().mean() / square.diagonal().mean().clamp(min=1e-300)
        return (weighted + scale * square) / 2


Metrics = Mapping[Reader, Metric]


def output_metrics(
    graph: fx.Graph,
    tensors: Callable[[str], Tensor],
    readers: Sequence[Reader],
    batches: Batches,
    pieces: Pieces,
    distance: OutputDistance,
) -> dict[Reader, Metric]:
    """For each reader how its errors count; those that no gradient reaches, or on too few rows, are left out.

    Rows count in effect as many as (sum of squared lengths)^2 / sum of their squares: with fewer than a reader has
    outputs, G says little but where these few are.

    Args:
        graph: what runs. tensors: its parameters and buffers. readers: of the graph.
        batches, pieces: the samples that moments are made from. distance: of outputs.
    """
    wanted = [reader for reader in readers if reader.gives_products and reader.sizes[1] <= _MOST_OUTPUTS]
    if not wanted or not pieces.samples[0]:
        return {}
    samples = len(range(0, pieces.samples[0], _stride(pieces)))
    sums, done = {reader.node: _Sums(reader, samples) for reader in wanted}, 0
    try:
        for piece in _parts(graph, tensors, batches, _chosen(batches, pieces)):
            _add(graph, tensors, sums, piece, distance)
            done += piece.samples
            sums = {node: own for node, own in sums.items() if own.may_tell(done / samples)}
            if not sums:
                return {}
    except RuntimeError as error:
        if not _is_of_way_back(error):
            raise
        return {}
    return {own.reader: metric for own in sums.values() if (metric := own.metric()) is not None}


def _is_of_way_back(error: RuntimeError) -> bool:
    """Whether an operator has no derivative, or what it needs was written over; torch tells by texts alone."""
    return any(word in str(error) for word in _WAY_BACK)


class _Sums:
    """Sums over the rows of one reader.

    Attributes:
        reader: the reader. samples: how many there will be.
    """

    def __init__(self, reader: Reader, samples: int) -> None:
        self.reader = reader
        self._rows = Rows(reader, reader.sizes[2], 4 * samples)  # of images, a quarter of the rows that moments have
        self._is_centred = reader.moving_mean is not None or all(name is not None for name in reader.biases)
        self._count = 0
        self._gram = self._weight = self._total = self._square = self._size = self._squared_size = torch.zeros(())
        self._shift: Tensor | None = None

    def inputs(self, data: Tensor, piece: Piece) -> Inputs:
        """The rows of a piece that are taken."""
        return [(self.reader.inputs_at(data, places), places) for places in self._rows.places(data, piece)]

    def add(self, gradient: Tensor, positions: tuple[int, ...], inputs: Inputs) -> None:
        """Add the rows of a piece."""
        everywhere = torch.unravel_index(torch.arange(math.prod(positions), device=gradient.device), positions)
        own = self.reader.outputs_at(gradient, everywhere).double()
        self._gram = self._gram.to(own) + own.transpose(1, 2) @ own
        self._count += own.shape[1]
        sizes = own.square().sum(2)
        self._size = self._size.to(sizes) + sizes.sum(1)
        self._squared_size = self._squared_size.to(sizes) + sizes.square().sum(1)
        for rows, places in inputs:
            self._add_inputs(rows, self.reader.outputs_at(gradient, places).double().square().sum(2))

    def _add_inputs(self, rows: Tensor, weight: Tensor) -> None:
        """Add rows, [groups, rows, columns], and what they count for, [groups, rows]."""
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if self._shift is None:
            self._shift = rows.mean(1, keepdim=True) if self._is_centred else rows.new_zeros(())
            groups, _, columns = rows.shape
            self._square = weight.new_zeros(groups, columns, columns)
        lengths = weight.sqrt()[..., None].to(rows)
        shifted = (rows - self._shift) * lengths
        self._weight = self._weight.to(weight) + weight.sum(1)
        self._total = self._total.to(weight) + (lengths.transpose(1, 2) @ shifted)[:, 0]
        add_products(self._square, shifted)

    def may_tell(self, share: float) -> bool:
        """Whether G may come to have as many rows as outputs, by those after a share of the samples."""
        rows = self._size.square() / self._squared_size.clamp(min=1e-300)
        return bool((_AHEAD * rows >= share * self.reader.sizes[1]).any())

    def metric(self) -> Metric | None:
        """What came of it; None where no gradient did, or hardly any row has one, as where a classifier is sure."""
        rows = self._size.square() / self._squared_size.clamp(min=1e-300)
        if (
            not self._count
            or bool((rows < self.reader.sizes[1]).any())
            or (root := _root(self._gram, self._count)) is None
        ):
            return None
        weight = self._weight.clamp(min=1e-300)[:, None, None]
        square = self._square / weight
        if self._is_centred:
            mean = self._total / weight[..., 0]
            square = square - mean[:, :, None] * mean[:, None, :]
        return Metric(root, square) if bool(torch.isfinite(square).all()) else None


def _stride(pieces: Pieces) -> int:
    """One in so many samples is taken."""
    total = pieces.samples[0]
    return max(1, total // min(max(total // _SHARE, _FEWEST), _MOST))


def _chosen(batches: Batches, pieces: Pieces) -> Iterator[Piece]:
    """Of all samples one in so many, whatever pieces they fell into."""
    stride = _stride(pieces)
    for piece in pieces:
        places = torch.arange(piece.samples)
        taken = places[(places + piece.first) % stride == 0]
        if len(taken):  # numbered among those that are chosen
            yield replace(batches.some(piece, taken), first=-(-piece.first // stride))


def _parts(
    graph: fx.Graph, tensors: Callable[[str], Tensor], batches: Batches, pieces: Iterator[Piece]
) -> Iterator[Piece]:
    """The pieces, cut into parts whose values fit in memory."""
    most = 0
    for piece in pieces:
        places = torch.arange(piece.samples)
        if not most:
            most = max(1, _MOST_BYTES // max(1, _bytes(graph, tensors, batches.head(piece, 1))))
            if most > _FIRST < len(places):  # those say whether others are worth it
                yield batches.some(piece, places[:_FIRST])
                places = places[_FIRST:]
        for some in places.split(most):
            yield batches.some(piece, some)


def _bytes(graph: fx.Graph, tensors: Callable[[str], Tensor], piece: Piece) -> int:
    """What the values of a run take."""
    total = 0

    def watch(node: fx.Node, value: Any) -> None:
        nonlocal total
        if isinstance(value, Tensor) and node.op == "call_function":
            total += value.nbytes

    Interpreter(graph, tensors, watch=watch).run(*piece.inputs, enable_io_processing=False)
    return total


class _Marked(Interpreter):
    """Adds a zero to what readers give, which has the value's gradient then, and takes rows of what they receive.

    Attributes:
        zeros: by node what is added. positions, inputs: by node of its reader. values: of the nodes that are kept.
    """

    def __init__(
        self,
        graph: fx.Graph,
        tensors: Callable[[str], Tensor],
        sums: Mapping[fx.Node, _Sums],
        piece: Piece,
        kept: Sequence[fx.Node],
    ) -> None:
        super().__init__(graph, lambda name: without_gradient(tensors(name)))
        self._sums, self._piece, self._kept = sums, piece, kept
        self.zeros: dict[fx.Node, Tensor] = {}
        self.positions: dict[fx.Node, tuple[int, ...]] = {}
        self.inputs: dict[fx.Node, Inputs] = {}
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        value = super().run_node(n)
        own = self._sums.get(n)
        if own is not None:
            data = self.env[own.reader.data].detach()
            self.positions[n], self.inputs[n] = own.reader.positions(data), own.inputs(data, self._piece)
            self.zeros[n] = torch.zeros_like(value, requires_grad=True)
            value = value + self.zeros[n]
        if n in self._kept:
            self.values[n] = value
        return value


def _add(
    graph: fx.Graph,
    tensors: Callable[[str], Tensor],
    sums: Mapping[fx.Node, _Sums],
    piece: Piece,
    distance: OutputDistance,
) -> None:
    """Add the rows of a piece."""
    # cuDNN has no way back through recurrent layers in eval mode
    with torch.inference_mode(False), torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
        run = _Marked(graph, tensors, sums, piece, distance.leaves)
        run.run(*piece.inputs, enable_io_processing=False)
        values = [run.values[leaf] for leaf in distance.leaves]
        ends = [
            (value, direction.to(value))
            for value, direction in zip(values, _directions(distance, values, piece), strict=True)
            if direction is not None and value.requires_grad
        ]
        if not ends:
            return
        outputs, directions = zip(*ends, strict=True)
        found = torch.autograd.grad(outputs, [*run.zeros.values()], directions, allow_unused=True)
    for node, gradient in zip(run.zeros, found, strict=True):
        if gradient is not None:
            sums[node].add(gradient, run.positions[node], run.inputs[node])


def _directions(distance: OutputDistance, values: Sequence[Any], piece: Piece) -> list[Tensor | None]:
    """D^(1/2) z for each output; None for those that are not compared."""
    found: list[Tensor | None] = []
    for value, (kind, axis) in zip(values, distance.kinds, strict=True):
        if not (isinstance(value, Tensor) and value.is_floating_point() and value.dim()):
            found.append(None)
            continue
        name = distance.given if isinstance(distance.given, str) and distance.given != "auto" else kind
        output = value.detach().double()
        direction = _direction(name, axis, output, _drawn(output, piece))
        if len(distance.leaves) > 1:  # of each output a mean over rows, or a share of its energy
            direction = direction / _size(name, axis, output)
        if piece.counts is not None and tuple(piece.counts.shape) == tuple(value.shape[: piece.counts.dim()]):
            wide = piece.counts.reshape(*piece.counts.shape, *[1] * (value.dim() - piece.counts.dim()))
            direction = direction * wide.to(direction.device)
        found.append(direction.nan_to_num(0, 0, 0))
    return found


def _drawn(value: Tensor, piece: Piece) -> Tensor:
    """Normal draws; those of a sample depend on its number alone."""
    generator = torch.Generator()
    leads = len(value) == piece.samples
    parts = []
    for place in range(len(value) if leads else 1):
        generator.manual_seed(piece.first + place)
        shape = value.shape[1:] if leads else value.shape
        parts.append(torch.randn(shape, generator=generator, dtype=torch.float64))
    return (torch.stack(parts) if leads else parts[0]).to(value.device)


def _direction(kind: str, axis: int, value: Tensor, drawn: Tensor) -> Tensor:
    if kind.startswith("divergence"):
        if "probabilities" in kind:
            return drawn / value.clamp(min=1e-12).sqrt()
        root = value.softmax(axis).sqrt()
        return root * (drawn - root * (root * drawn).sum(axis, keepdim=True))
    if kind == "cosine":
        length: Tensor = torch.linalg.vector_norm(value, dim=-1, keepdim=True).clamp(min=1e-30)
        unit = value / length
        return (drawn - unit * (unit * drawn).sum(-1, keepdim=True)) / length
    return drawn


def _size(kind: str, axis: int, value: Tensor) -> Tensor:
    """The root of what a sample's part of the distance is divided by."""
    rest = tuple(range(1, value.dim()))
    if kind.startswith("divergence") or kind == "cosine":
        rows = math.prod(value.shape[1:]) / value.shape[axis]
        return value.new_tensor(math.sqrt(2 * rows))
    squares = value.square()
    energy: Tensor = squares.sum(rest, keepdim=True) if rest else squares
    return energy.clamp(min=1e-30).sqrt()


def _root(square: Tensor, rows: int) -> Tensor | None:
    """L with L L^T = G, drawn a little towards the identity, more where it has few rows; None where there is no G."""
    outputs = square.shape[1]
    mean = float(square.diagonal(dim1=1, dim2=2).mean())
    if not (math.isfinite(mean) and mean > 0):
        return None
    share = _DRAWN * outputs / (rows + outputs)
    identity = torch.eye(outputs, dtype=square.dtype, device=square.device)
    factor, failed = torch.linalg.cholesky_ex((1 - share) * square + share * mean * identity)
    return None if bool(failed.any()) else factor
