"""The analysis behind `fxprune.sensitivity` and the importance "obs": orders of removal, and curves of losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxprune.borrowing import taken
from fxprune.channels.budget import masks
from fxprune.channels.groups import ChannelGroup, Grouping
from fxprune.errors import ArgumentError
from fxprune.graph.interpretation import without_gradient
from fxprune.graph.names import tensor_at
from fxprune.progress import Work, working
from fxprune.prune.channel_scores import unit_scores
from fxprune.prune.importance_registry import Evidence
from fxprune.prune.repair import input_moments
from fxprune.prune.repair.bases import Basis, Change, changed, find_bases, only_exact, sorted_bases
from fxprune.prune.repair.batches import Batches, Piece
from fxprune.prune.repair.input_moments import InputMoments, in_passes
from fxprune.prune.repair.layers import Reader
from fxprune.prune.repair.moments import Moments
from fxprune.prune.repair.pieces import Pieces
from fxprune.prune.repair.products import Product
from fxprune.prune.repair.shelf import Shelf
from fxprune.prune.sensitivity.curve import Curve
from fxprune.prune.sensitivity.curves import Forks
from fxprune.prune.sensitivity.distances import OutputDistance
from fxprune.prune.sensitivity.elimination import Order, Part, removal_order
from fxprune.prune.sensitivity.metrics import Metric, Metrics, output_metrics
from fxprune.prune.sensitivity.moments_of_all import moments_over
from fxprune.prune.sensitivity.readings import Reading, owners, readings
from fxprune.prune.sensitivity.turns import Turns

DAMPING = 1e-2
_LEAST_ENERGY = 1e-12  # of an output, relative to what the same inputs give about zero; less is rounding


@dataclass(frozen=True)
class Measured:
    """What came of it.

    Attributes:
        curves: one a group. samples: how many moments were made from, and how many curves were measured on.
    """

    curves: list[Curve]
    samples: tuple[int, int]


def measure(
    grouping: Grouping,
    graph: fx.Graph,
    groups: Sequence[ChannelGroup],
    batches: Batches,
    distance: OutputDistance,
    shares: Sequence[float],
    samples: int,
) -> Measured:
    """The curve of each group.

    Args:
        grouping: of the module. graph: what runs, as `in_single_layers` gives it. groups: those to measure.
        batches: inputs. distance: of outputs.
        shares: of a group's units, at which it is measured. samples: how many it is measured on at most.

    Raises:
        PruningError: NaN or inf come up. ArgumentError: there are fewer than two samples, or no row counts.
    """
    curves: dict[int, Curve] = {}
    with torch.no_grad(), Shelf() as shelf, working("sensitivity", len(groups)) as work:
        fitted, judging = _kept(batches, shelf, samples)
        forks = Forks(grouping.plain, graph, judging, distance)
        analysis = _Analysis(grouping, graph, groups, forks, shares, batches.head(judging[0], 2))
        total = fitted.samples[0]
        for part in [*in_passes(analysis.needed)] or [[]]:  # there are curves where nothing reads the channels, too
            moments = moments_over(graph, analysis.tensor, part, fitted)
            ordered = analysis.ordering(part)
            analysis.take(moments, output_metrics(graph, analysis.tensor, ordered, batches, fitted, distance))
            curves |= analysis.ready(work)
    judged = sum(piece.samples for piece in judging)
    return Measured([curves[id(group)] for group in groups], (total, judged))


def _kept(batches: Batches, shelf: Shelf, samples: int) -> tuple[Pieces, list[Piece]]:
    """The pieces whose moments are taken, with inputs on the shelf, and those that curves are measured on."""
    fitted = Pieces(shelf)
    judging: list[Piece] = []
    for piece in batches:
        if not piece.is_held:
            fitted.add(piece)
        elif (missing := samples - sum(each.samples for each in judging)) > 0:
            some = batches.head(piece, missing)
            judging += [some] if some.counts is None or bool(some.counts.any()) else []
    if not judging:
        raise ArgumentError(
            "weight leaves no row of the samples that are held back, on which losses are measured; some are needed. "
            "Give more samples, or let more rows count."
        )
    return fitted, judging


class _Analysis:
    """Groups whose readers' moments are not all there yet."""

    def __init__(
        self,
        grouping: Grouping,
        graph: fx.Graph,
        groups: Sequence[ChannelGroup],
        forks: Forks,
        shares: Sequence[float],
        piece: Piece,
    ) -> None:
        self._grouping, self._forks, self._shares = grouping, forks, shares
        everything = [each for each in readings(grouping, graph) if _is_affordable(each.reader)]
        self._columns: dict[int, list[tuple[Reading, list[tuple[int, Tensor]]]]] = {}
        self._bases: dict[int, list[Basis]] = {}
        readers = [each.reader for each in everything if isinstance(each.reader, Reader)]
        bases = find_bases(graph, readers, self.tensor, piece.inputs)
        bases = only_exact(bases, graph, self.tensor, piece.inputs)
        rows = {each.reader.name: each.rows for each in everything if isinstance(each.reader, Reader)}
        for group in groups:
            owner = owners(grouping, group)
            found = [(each, columns) for each in everything if (columns := each.columns(owner, group.size))]
            self._columns[id(group)] = found
            own = [basis for basis in bases if _turns(basis, rows.get(basis.first.name), owner)]
            allowed = {id(basis.second) for basis in own}
            if all(isinstance(each.reader, Product) or id(each.reader) in allowed for each, _ in found):
                self._bases[id(group)] = own
        self._positions = {
            (id(group), id(basis)): [self._units(rows[basis.first.name], head.first[0], group) for head in basis.heads]
            for group in groups
            for basis in self._bases.get(id(group), ())
        }
        order = {node: number for number, node in enumerate(graph.nodes)}
        needed = {id(each): each for group in groups for each in self._readers(group)}
        self.needed = sorted(needed.values(), key=lambda reader: order[reader.node])
        gone = {id(group): masks(grouping, ~grouping.units.dead(group.units)) for group in groups}
        self._starts = {number: forks.start_of(own.keys()) for number, own in gone.items()}
        self._waiting = sorted(groups, key=lambda group: self._starts[id(group)])
        self._moments: dict[object, Any] = {}
        self._metrics: dict[int, Metric] = {}  # by the id of a reader

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer of the module; also the body of control flow."""
        found: Tensor = without_gradient(tensor_at(self._grouping.plain, name))
        return found

    def _units(self, rows: Any, places: Tensor, group: ChannelGroup) -> Tensor:
        """The units of a group that some outputs go with."""
        return torch.from_numpy(owners(self._grouping, group)[rows.reshape(-1)[places.numpy()]])

    def _readers(self, group: ChannelGroup) -> list[Reader | Product]:
        """Those whose moments a group needs."""
        found = [each.reader for each, _ in self._columns[id(group)]]
        return found + [reader for basis in self._bases.get(id(group), ()) for reader in basis.readers]

    def ordering(self, readers: Sequence[Reader | Product]) -> list[Reader]:
        """Those by whose outputs the units of a group are ordered."""
        found = {
            id(each.reader)
            for number, columns in self._columns.items()
            if not self._bases.get(number) and not any(isinstance(each.reader, Product) for each, _ in columns)
            for each, _ in columns
        }
        return [reader for reader in readers if isinstance(reader, Reader) and id(reader) in found]

    def take(self, moments: InputMoments, metrics: Metrics) -> None:
        """Keep moments, and metrics of outputs, until the groups that need them are done."""
        self._moments |= moments.complete()
        self._metrics |= {id(reader): metric for reader, metric in metrics.items()}

    def ready(self, work: Work) -> dict[int, Curve]:
        """The curves of the groups, in the order of the graph, whose moments are there."""
        found = {}
        while self._waiting and all(_key(each) in self._moments for each in self._readers(self._waiting[0])):
            group = self._waiting.pop(0)
            work.show(group.name)
            work.advance(1)
            found[id(group)] = self._curve(group)
            left = [each for other in self._waiting for each in self._readers(other)]
            keys, readers = {_key(each) for each in left}, {id(each) for each in left}
            self._moments = {key: value for key, value in self._moments.items() if key in keys}
            self._metrics = {reader: value for reader, value in self._metrics.items() if reader in readers}
        return found

    def _curve(self, group: ChannelGroup) -> Curve:
        parts = [
            (each, number, part)
            for each, columns in self._columns[id(group)]
            for number, part in self._parts(each, columns)
        ]
        if sum(part.weights.nbytes for *_, part in parts) <= sum(part.inverse.nbytes for *_, part in parts):
            # of a module that is spread: no more than the moments, which are here, and read at each step
            parts = [(each, number, replace(part, weights=taken(part.weights))) for each, number, part in parts]
        telling = self._telling(group, parts)
        turns = Turns.of(group)
        order = removal_order(telling, group.size, turns) if telling else _by_weights(self._grouping, group, turns)
        counts = sorted({turns.nearest(share * group.size) for share in self._shares})
        begin = self._starts[id(group)]
        turned = {
            id(basis): sorted_bases(basis, self._moments, self.tensor) for basis in self._bases.get(id(group), ())
        }
        order = self._reordered(group, turned, order)
        variants = (
            self._turned(group, turned, units) if turned else self._changed(group, parts, units)
            for units in (order.units[:count] for count in counts)
        )
        measured = self._forks.losses(variants, begin)
        return Curve(
            group.name, group.kind, group.size, tuple(map(str, group.members)), tuple(group.units.tolist()),
            tuple(order.units.tolist()), tuple(counts), tuple(measured), tuple(order.losses.tolist()),
        )  # fmt: skip

    def _reordered(self, group: ChannelGroup, turned: Mapping[int, Sequence[Change]], order: Order) -> Order:
        """The order by what units add in the bases that heads get: those that go first are given what adds least."""
        if not turned:
            return order
        ranks, added = order.units.argsort(), torch.zeros_like(order.losses)
        has_basis = torch.zeros(group.size, dtype=torch.bool)
        for basis in self._bases[id(group)]:
            energy = torch.stack([change.energy for change in turned[id(basis)]]).cpu()
            shares = energy / energy.sum().clamp(min=1e-300)
            for units, share in zip(self._positions[id(group), id(basis)], shares, strict=True):
                added[units[ranks[units].argsort()]] += share.flip(0)
                has_basis[units] = True
        losses = torch.where(has_basis, added, order.losses[ranks])[order.units]
        again = losses.argsort(stable=True)
        return Order(order.units[again], losses[again])

    def _telling(self, group: ChannelGroup, parts: Sequence[tuple[Reading, int, Part]]) -> list[Part]:
        """The parts that say what goes: by what the output loses where that is known of all, else by what they lose."""
        telling = [(each, number, part) for each, number, part in parts if math.isfinite(part.energy)]
        metrics = [self._metrics.get(id(each.reader)) for each, _, _ in telling]
        if self._bases.get(id(group)) or any(metric is None for metric in metrics):
            return [part for _, _, part in telling]
        return [
            self._seen(each.reader, number, part, metric)
            for metric, (each, number, part) in zip(metrics, telling, strict=True)
            if metric is not None and isinstance(each.reader, Reader)
        ]

    def _seen(self, reader: Reader, number: int, part: Part, metric: Metric) -> Part:
        """A part by what the output loses: of its inputs, those count more where the output moves more."""
        square = metric.mixed(number, _square(self._moments[reader.key], reader)[number])
        return replace(part, inverse=_inverse(square)).seen_through(metric.root[number])

    def _parts(self, reading: Reading, columns: Sequence[tuple[int, Tensor]]) -> list[tuple[int, Part]]:
        found = self._moments[_key(reading.reader)]
        if isinstance(reading.reader, Product):
            assert isinstance(found, Tensor)
            (number, table), square = columns[0], found
            energy = float(square.sum()) or math.inf
            return [(number, Part(_inverse(square), square.new_ones(1, len(square)), table, energy))]
        assert isinstance(found, Moments)
        reader = reading.reader
        square = _square(found, reader)
        raw = found.mean_squares
        weights = _table(self._grouping, reader).double()
        parts = []
        for number, table in columns:
            energy = float(((weights[number] @ square[number]) * weights[number]).sum())
            says_something = energy > _LEAST_ENERGY * float((weights[number].square() @ raw[number]).sum())
            energy = energy if says_something else math.inf
            parts.append((number, Part(_inverse(square[number]), weights[number], table, energy)))
        return parts

    def _turned(self, group: ChannelGroup, turned: Mapping[int, Sequence[Change]], units: Tensor) -> dict[str, Tensor]:
        """The parameters without some channels of heads, in bases in which these matter least."""
        found: dict[str, Tensor] = {}

        def tensor(name: str) -> Tensor:
            return found.get(name, self.tensor(name))

        zeroed = self._masks(group, units.tolist())
        for basis in self._bases[id(group)]:
            places = self._positions[id(group), id(basis)]
            dead = [torch.isin(own, units) for own in places]
            changes = [each.arranged(gone) for each, gone in zip(turned[id(basis)], dead, strict=True)]
            found |= changed(basis, changes, tensor)
            if not basis.is_product:
                self._make_up(basis, changes, dead, found)
        return {name: tensor(name) * zeroed.get(name, 1) for name in {**found, **zeroed}}

    def _make_up(
        self, basis: Basis, changes: Sequence[Change], dead: Sequence[Tensor], found: dict[str, Tensor]
    ) -> None:
        """Let the columns of all heads make up for those that are dead, in the bases that the heads have now."""
        reader = basis.second
        moments = self._moments[reader.key]
        square = _square(moments, reader)[0]
        turn = torch.eye(len(square), dtype=square.dtype, device=square.device)
        for head, change in zip(basis.heads, changes, strict=True):
            for columns in head.second:
                turn[columns[:, None], columns] = change.first
        square = turn.T @ square @ turn
        weights = reader.table([found[reader.name]])[0].double()
        gone = torch.cat([head.second[:, own].flatten() for head, own in zip(basis.heads, dead, strict=True)])
        difference = Part(_inverse(square), weights, gone[:, None], 1.0).change(torch.arange(len(gone)))
        (values,) = reader.stored((weights + difference)[None], [found[reader.name]])
        found[reader.name] = values.to(found[reader.name].dtype)
        if reader.biases[0] is not None:
            mean = (moments.total[0] / moments.count + moments.shift[0]) @ turn
            bias = self.tensor(reader.biases[0])
            found[reader.biases[0]] = bias - (difference @ mean).to(bias.dtype)

    def _changed(
        self, group: ChannelGroup, parts: Sequence[tuple[Reading, int, Part]], units: Tensor
    ) -> dict[str, Tensor]:
        """The parameters without some units, whose readers make up for them."""
        plain = self._grouping.plain
        zeroed = self._masks(group, units.tolist())
        changed = {name: tensor_at(plain, name) * mask for name, mask in zeroed.items()}
        changes: dict[int, tuple[Reader, Tensor]] = {}
        for reading, number, part in parts:
            reader = reading.reader
            if isinstance(reader, Product):
                continue
            _, change = changes.setdefault(id(reader), (reader, part.weights.new_zeros(reader.sizes)))
            change[number] = part.change(units)
        for reader, change in changes.values():
            stored = [tensor_at(plain, name) for name in reader.weights]
            table = reader.table(stored)
            for name, values in zip(reader.weights, reader.stored(table + change, stored), strict=True):
                changed[name] = values.to(stored[0].dtype) * zeroed.get(name, 1)
            self._shift(reader, change, changed, zeroed)
        return changed

    def _shift(self, reader: Reader, change: Tensor, changed: dict[str, Tensor], zeroed: Mapping[str, Tensor]) -> None:
        """Let the bias, or a running mean behind, take up the mean shift."""
        plain = self._grouping.plain
        found = self._moments[reader.key]
        assert isinstance(found, Moments)
        mean = found.total / found.count + found.shift
        shift = -torch.einsum("gk,grk->gr", mean, change).flatten()
        names = [name for name in reader.biases if name is not None]
        parts = shift.split([len(tensor_at(plain, name)) for name in names]) if names else ()
        for name, part in zip(names, parts, strict=True):
            bias = changed.get(name, tensor_at(plain, name))
            changed[name] = bias + part.to(bias.dtype) * zeroed.get(name, 1)
        if not names and reader.moving_mean is not None:
            moving = tensor_at(plain, reader.moving_mean)
            changed[reader.moving_mean] = moving - shift.to(moving.dtype)

    def _masks(self, group: ChannelGroup, units: Sequence[int]) -> dict[str, Tensor]:
        found = masks(self._grouping, ~self._grouping.units.dead(group.units[list(units)]))
        return {name: mask.to(self.tensor(name).device) for name, mask in found.items()}


def _key(reader: Reader | Product) -> Any:
    return reader.node if isinstance(reader, Product) else reader.key


def _is_affordable(reader: Reader | Product) -> bool:
    """Whether moments of a reader fit in memory; others are not made up for, as `reconstruct` leaves them alone."""
    return isinstance(reader, Product) or reader.sizes[2] <= input_moments.MOST_COLUMNS


def _turns(basis: Basis, rows: Any, owner: Any) -> bool:
    """Whether every channel of the heads is a unit of a group."""
    if rows is None:
        return False
    own = owner[rows.reshape(-1)]
    units = [own[each] for head in basis.heads for each in head.first.numpy()]
    return all(bool((each >= 0).all()) and len(np.unique(each)) == len(each) for each in units)


def _square(found: Moments, reader: Reader) -> Tensor:
    """The second moment of a reader's inputs, a mean over rows: about the mean where a bias takes that up."""
    is_centred = reader.moving_mean is not None or all(name is not None for name in reader.biases)
    return found.normal_square(is_centred) / found.count


def _inverse(square: Tensor) -> Tensor:
    damped = square.clone()
    mean = float(square.diagonal().mean())
    damped.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


def _table(grouping: Grouping, reader: Reader) -> Tensor:
    return reader.table([tensor_at(grouping.plain, name).detach() for name in reader.weights])


def _by_weights(grouping: Grouping, group: ChannelGroup, turns: Turns) -> Order:
    """The smallest weights first: of what no contraction of its own reads, nothing else is known."""
    (scores,) = unit_scores(grouping.plain, grouping, [group], "l2", Evidence())
    found = torch.from_numpy(scores)
    units = found.argsort(stable=True)
    units = units[turns.arranged(units)]
    return Order(units, found[units])
