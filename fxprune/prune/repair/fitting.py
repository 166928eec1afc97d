"""One wave of fits: moments summed over the pieces, then weights and biases written."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from fxprune.channels.arguments import bound
from fxprune.errors import ArgumentError
from fxprune.graph.expressions import evaluate
from fxprune.graph.masks import ParameterView, view
from fxprune.graph.names import tensor_at
from fxprune.graph.traced import TracedModule
from fxprune.prune.repair.batches import Piece
from fxprune.prune.repair.changes import Changes
from fxprune.prune.repair.finding import Stream
from fxprune.prune.repair.layers import Reader
from fxprune.prune.repair.moments import Moments, first_shift
from fxprune.prune.repair.pair import Environment
from fxprune.prune.repair.references import References
from fxprune.prune.repair.report import ReaderRepair
from fxprune.prune.repair.rows import Rows
from fxprune.prune.repair.solving import Fit, Problem, best_fit, share

# of the error without a bias; a parameter more has to leave less than this
_WORTH_A_BIAS = 0.99
# an input that differs from row to row by less than this many roundings, as sums of constants do, says nothing
_ROUNDINGS = 64


@dataclass(frozen=True, eq=False)
class Solved:
    """What came of one reader: its report, and the bias [groups, outputs] that it is to get, None for none."""

    reader: Reader
    repair: ReaderRepair
    new_bias: Tensor | None

    def unchanged(self) -> Solved:
        """The same for weights that stay."""
        return replace(self, repair=replace(self.repair, damping=None))


@dataclass(eq=False)
class Target:
    """A reader, its weights as they are, and what it is to compute.

    Attributes:
        reader: the reader. traced: its module. references: the network to approach.
        streams: for each call, what its output is added to, where what that is missing counts.
        may_get_bias: whether it has none, and can get one.
        table, bias: its weights [groups, outputs, columns] and bias [groups, outputs].
        support, biased: which of them are alive.
        scales: for each call [groups, outputs], what a batch norm multiplies the output with before it is added.
    """

    reader: Reader
    traced: TracedModule
    references: References
    streams: Sequence[Stream | None]
    may_get_bias: bool
    table: Tensor = field(init=False)
    bias: Tensor = field(init=False)
    support: Tensor = field(init=False)
    biased: Tensor = field(init=False)
    scales: list[Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        reader, sizes = self.reader, self.reader.sizes
        weights = self.weights
        self.table = reader.table([each.value() for each in weights])
        self.support = reader.table([_alive(each) for each in weights])
        biases = self.biases
        self.bias = _joined([each.value() for each in biases], self.table.new_zeros(sizes[:2]))
        self.biased = _joined([_alive(each) for each in biases], self.support.new_zeros(sizes[:2]))
        if reader.moving_mean is not None:
            self.biased = self.alive
        norms = [None if stream is None else stream.norm for stream in self.streams]
        self.scales = [None if norm is None else _scale(self.traced, norm).reshape(sizes[:2]) for norm in norms]

    @property
    def weights(self) -> list[ParameterView]:
        return [view(self.traced, name) for name in self.reader.weights]

    @property
    def biases(self) -> list[ParameterView]:
        return [view(self.traced, name) for name in self.reader.biases if name is not None]

    @property
    def corrects_stream(self) -> bool:
        """Whether what a stream is missing counts."""
        return any(stream is not None for stream in self.streams)

    @property
    def alive(self) -> Tensor:
        """[groups, outputs], which have a weight."""
        return self.support.any(-1)

    def reference_rows(self, values: Environment, number: int, places: tuple[Tensor, ...]) -> Tensor:
        """What one call of the reference, by its number, computes at some positions."""
        reader, call = self.reader, self.reader.calls[number]
        biases = [self.references.value(name) for name in reader.biases if name is not None]
        if reader.gives_products:
            rows = reader.outputs_at(values[call.node], places)
            return rows if call.added is None else rows + biases[0].reshape(reader.sizes[:2])[:, None]
        table = reader.table([self.references.value(name) for name in reader.weights])
        bias = _joined(biases, table.new_zeros(reader.sizes[:2]))
        return reader.inputs_at(reader.received(call, values, values), places) @ table.transpose(1, 2) + bias[:, None]

    def missing_rows(
        self, current: Environment, reference: Environment, number: int, places: tuple[Tensor, ...]
    ) -> Tensor | None:
        """What the stream of a call is missing at some positions, in the units of the reader's output."""
        stream, scale = self.streams[number], self.scales[number]
        if stream is None:
            return None
        output = reference[self.reader.calls[number].node]
        lack = reference[stream.other] - current[stream.other]
        rows = self.reader.outputs_at(torch.broadcast_to(lack, output.shape), places)
        return rows if scale is None else torch.where(scale[:, None] == 0, 0, rows / scale[:, None])

    def write(self, fit: Fit, changes: Changes) -> None:
        """Change live weights and the bias."""
        table = self.reader.stored(self.table + fit.change, [each.value() for each in self.weights])
        for found, values in zip(self.weights, table, strict=True):
            _write(found, values, changes)
        if self.biases:
            values = (self.bias + fit.bias).flatten()
            for found, part in zip(self.biases, values.split([len(each.value()) for each in self.biases]), strict=True):
                _write(found, part, changes)
        elif self.reader.moving_mean is not None:
            mean = tensor_at(self.traced, self.reader.moving_mean)
            changes.set(mean, mean - fit.bias.flatten())


def _alive(found: ParameterView) -> Tensor:
    return torch.ones_like(found.value(), dtype=torch.bool) if found.mask is None else found.mask != 0


def _joined(parts: Sequence[Tensor], otherwise: Tensor) -> Tensor:
    return torch.cat([*parts]).reshape(otherwise.shape) if parts else otherwise


def _write(found: ParameterView, values: Tensor, changes: Changes) -> None:
    original = found.original
    assert original is not None
    if found.mask is not None:
        values = torch.where(found.mask != 0, values / found.mask, original.detach())
    changes.set(original, values.to(original.dtype))


def _scale(traced: TracedModule, norm: fx.Node) -> Tensor:
    given = bound(norm)
    variance = evaluate(traced, given["running_var"])
    gain = 1.0 if given["weight"] is None else evaluate(traced, given["weight"])
    return gain / torch.sqrt(variance + given["eps"])


class Family:
    """Readers of the same rows of inputs, and their moments.

    Args:
        targets: the readers. samples: how many there are to fit.
    """

    def __init__(self, targets: Sequence[Target], samples: int) -> None:
        self.targets = targets
        support = torch.stack([target.support.any(1).any(0) for target in targets]).any(0)
        self.columns = support.nonzero()[:, 0]
        outputs = [target.reader.sizes[1] for target in targets]
        self.fit, self.held = Moments(outputs), Moments(outputs)
        self._shift: Tensor | None = None
        self._dtype = torch.float64
        self._rows = Rows(targets[0].reader, len(self.columns), samples)

    def add(self, current: Environment, reference: Environment, piece: Piece) -> None:
        """Add the rows of a piece."""
        for number, call in enumerate(self.targets[0].reader.calls):
            data = self.targets[0].reader.received(call, current, reference)
            for places in self._rows.places(data, piece):
                self._add(current, reference, number, places, piece.is_held)

    def _add(
        self, current: Environment, reference: Environment, number: int, places: tuple[Tensor, ...], is_held: bool
    ) -> None:
        reader = self.targets[0].reader
        data = reader.received(reader.calls[number], current, reference)
        inputs = reader.inputs_at(data, places)
        inputs = inputs if len(self.columns) == inputs.shape[-1] else inputs[..., self.columns]
        inputs = inputs if inputs.dtype == torch.float64 else inputs.float()
        outputs, errors = [], []
        for target in self.targets:
            rows = target.reference_rows(reference, number, places).to(inputs.dtype)
            table = target.table[..., self.columns].to(inputs.dtype)
            error = rows - target.bias[:, None].to(inputs.dtype)
            error.baddbmm_(inputs, table.transpose(1, 2), alpha=-1)
            outputs.append(rows)
            if (missing := target.missing_rows(current, reference, number, places)) is not None:
                error += missing
            errors.append(error)
        if self._shift is None:
            self._shift, self._dtype = first_shift(inputs), inputs.dtype
        (self.held if is_held else self.fit).add(inputs, errors, outputs, self._shift)

    def solve(self, dampings: Sequence[float], changes: Changes, spent: float) -> Iterator[Solved]:
        """Refit every reader; `spent` are the seconds that summing took for each.

        Raises:
            ArgumentError: no row counts.
        """
        if not (self.fit.count and self.held.count):
            raise ArgumentError(
                f"weight leaves {self.targets[0].reader.name!r} {self.fit.count} rows to fit and {self.held.count} to "
                "judge the fit by; some of each are needed. Give more samples, or let more rows count."
            )
        for number, target in enumerate(self.targets):
            start = time.perf_counter()
            fit, gets_bias = self._best(target, number, dampings)
            unknowns = int(self._support(target, target.biased).sum(-1).max())
            if fit.damping is not None:
                full = fit.change.new_zeros(target.reader.sizes)
                full[..., self.columns] = fit.change
                target.write(Fit(full, fit.bias, fit.damping, fit.before, fit.after), changes)
            note = _note(target, self.fit.count, unknowns, gets_bias)
            repair = ReaderRepair(
                fit.before, fit.after, self.fit.count, self.held.count, unknowns, fit.damping, target.corrects_stream,
                spent + time.perf_counter() - start, note,
            )  # fmt: skip
            yield Solved(target.reader, repair, fit.bias if gets_bias else None)

    def reads_any(self, nodes: Collection[fx.Node]) -> bool:
        """Whether what the readers read of the network that is fitted is the value of one of these nodes."""
        reader = self.targets[0].reader
        return not reader.reads_reference and any(call.data in nodes for call in reader.calls)

    def errors(self) -> list[float]:
        """The held-back errors of the readers as they are, relative to the energy of the reference's outputs."""
        found = []
        for number, target in enumerate(self.targets):
            errors = self.held.errors[number]
            energy, scale = (float(each[target.alive].sum()) for each in (errors.energy, errors.output))
            found.append(share(energy, scale))
        return found

    def values(self) -> list[tuple[Tensor, Tensor]]:
        """The tensors that fits write into, and what they hold."""
        found = [each.original for target in self.targets for each in (*target.weights, *target.biases)]
        return [(tensor, tensor.detach().clone()) for tensor in found if tensor is not None]

    def _best(self, target: Target, number: int, dampings: Sequence[float]) -> tuple[Fit, bool]:
        """The fit, and whether it is one with a bias that the reader has not yet."""

        def fitted(biased: Tensor) -> Fit:
            problem = Problem(self.fit, self.held, number, self._support(target, biased), biased, target.alive)
            return best_fit(problem, dampings)

        fit = fitted(target.biased)
        if not target.may_get_bias:
            return fit, False
        shifted = fitted(target.alive)
        if shifted.damping is not None and shifted.after < _WORTH_A_BIAS * fit.after:
            return shifted, True
        return fit, False

    def _support(self, target: Target, biased: Tensor) -> Tensor:
        return target.support[..., self.columns] & self._tells(biased)

    def _tells(self, biased: Tensor) -> Tensor:
        """[groups, outputs, columns]: where an input says something; what never changes does a bias's work, or none."""
        rounding = (_ROUNDINGS * torch.finfo(self._dtype).eps * self.fit.shift).square() * self.fit.count
        varies = self.fit.square.diagonal(dim1=1, dim2=2) > rounding
        return varies[:, None] | ((self.fit.shift != 0)[:, None] & ~biased[..., None])


def _note(target: Target, rows: int, unknowns: int, gets_bias: bool) -> str:
    notes = ["fewer rows than unknowns"] if rows < unknowns else []
    if gets_bias:
        notes.append("a bias was made")
    elif not bool(target.biased.any()):
        notes.append("no bias takes the mean shift")
    return "; ".join(notes)


def families(
    readers: Sequence[Reader],
    streams: Mapping[fx.Node, Stream],
    biasable: Collection[str],
    traced: TracedModule,
    references: References,
    samples: int,
) -> list[Family]:
    """The readers of a wave by what they read.

    Args:
        readers: those of the wave. streams: by call, those of which what is missing counts.
        biasable: the weights of readers that can get a bias.
        traced, references: the two networks. samples: how many there are to fit.
    """
    found: dict[object, list[Target]] = {}
    for reader in readers:
        own = [streams.get(call.node) for call in reader.calls]
        target = Target(reader, traced, references, own, reader.name in biasable)
        found.setdefault(reader.key, []).append(target)
    return [Family(targets, samples) for targets in found.values()]
