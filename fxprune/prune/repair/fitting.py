"""One wave of fits: moments summed over the pieces, then weights and biases written."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

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
from fxprune.prune.repair.solving import Fit, Problem, best_fit


@dataclass(eq=False)
class Target:
    """A reader, its weights as they are, and what it is to compute.

    Attributes:
        reader: the reader. corrects: whether what its stream is missing counts. stream: what its output is added to.
        table, bias: its weights [groups, outputs, columns] and bias [groups, outputs].
        support, biased: which of them are alive.
        reference: weights and bias of the reference, where the call does not give the products themselves.
        scale: [groups, outputs], what a batch norm multiplies the output with before it is added.
    """

    reader: Reader
    traced: TracedModule
    references: References
    stream: Stream | None
    table: Tensor = field(init=False)
    bias: Tensor = field(init=False)
    support: Tensor = field(init=False)
    biased: Tensor = field(init=False)
    scale: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        reader, sizes = self.reader, self.reader.sizes
        weights = self.weights
        self.table = reader.table([each.value() for each in weights])
        self.support = reader.table([_alive(each) for each in weights])
        biases = self.biases
        self.bias = _joined([each.value() for each in biases], self.table.new_zeros(sizes[:2]))
        self.biased = _joined([_alive(each) for each in biases], self.support.new_zeros(sizes[:2]))
        if reader.moving_mean is not None:
            self.biased = self.support.any(-1)
        self.scale = None
        if self.stream is not None and self.stream.norm is not None:
            self.scale = _scale(self.traced, self.stream.norm).reshape(sizes[:2])

    @property
    def weights(self) -> list[ParameterView]:
        return [view(self.traced, name) for name in self.reader.weights]

    @property
    def biases(self) -> list[ParameterView]:
        return [view(self.traced, name) for name in self.reader.biases if name is not None]

    def reference_rows(self, values: Environment, places: tuple[Tensor, ...]) -> Tensor:
        """What the reference computes at some positions."""
        reader = self.reader
        if reader.gives_products:
            return reader.outputs_at(values[reader.node], places)
        table = reader.table([self.references.value(name) for name in reader.weights])
        biases = [self.references.value(name) for name in reader.biases if name is not None]
        bias = _joined(biases, table.new_zeros(reader.sizes[:2]))
        return reader.inputs_at(values[reader.data], places) @ table.transpose(1, 2) + bias[:, None]

    def missing_rows(self, current: Environment, reference: Environment, places: tuple[Tensor, ...]) -> Tensor | float:
        """What the stream is missing at some positions, in the units of the reader's output."""
        if self.stream is None:
            return 0.0
        output = reference[self.reader.node]
        lack = reference[self.stream.other] - current[self.stream.other]
        rows = self.reader.outputs_at(torch.broadcast_to(lack, output.shape), places)
        if self.scale is None:
            return rows
        return torch.where(self.scale[:, None] == 0, 0, rows / self.scale[:, None])

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
        self._rows = Rows(targets[0].reader, len(self.columns), samples)

    def add(self, current: Environment, reference: Environment, piece: Piece) -> None:
        """Add the rows of a piece."""
        first = self.targets[0].reader
        data = current[first.data]
        for places in self._rows.places(data, piece):
            self._add(data, current, reference, places, piece.is_held)

    def _add(
        self, data: Tensor, current: Environment, reference: Environment, places: tuple[Tensor, ...], is_held: bool
    ) -> None:
        inputs = self.targets[0].reader.inputs_at(data, places)[..., self.columns]
        inputs = inputs if inputs.dtype == torch.float64 else inputs.float()
        outputs, errors = [], []
        for target in self.targets:
            rows = target.reference_rows(reference, places).to(inputs.dtype)
            table = target.table[..., self.columns].to(inputs.dtype)
            own = inputs @ table.transpose(1, 2) + target.bias[:, None].to(inputs.dtype)
            outputs.append(rows)
            errors.append(rows - own + target.missing_rows(current, reference, places))
        if self._shift is None:
            self._shift = first_shift(inputs)
        (self.held if is_held else self.fit).add(inputs, errors, outputs, self._shift)

    def solve(self, dampings: Sequence[float], changes: Changes, spent: float) -> Iterator[tuple[Reader, ReaderRepair]]:
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
            support = target.support[..., self.columns] & self._tells(target.biased)
            alive = target.support.any(-1)
            fit = best_fit(Problem(self.fit, self.held, number, support, target.biased, alive), dampings)
            unknowns = int(support.sum(-1).max())
            if fit.damping is not None:
                full = fit.change.new_zeros(target.reader.sizes)
                full[..., self.columns] = fit.change
                target.write(Fit(full, fit.bias, fit.damping, fit.before, fit.after), changes)
            note, seconds = _note(target, self.fit.count, unknowns), spent + time.perf_counter() - start
            yield (
                target.reader,
                ReaderRepair(
                    fit.before, fit.after, self.fit.count, self.held.count, unknowns, fit.damping,
                    target.stream is not None, seconds, note,
                ),
            )  # fmt: skip

    def _tells(self, biased: Tensor) -> Tensor:
        """[groups, outputs, columns]: where an input says something; what never changes does a bias's work, or none."""
        varies = self.fit.square.diagonal(dim1=1, dim2=2) > 0
        return varies[:, None] | ((self.fit.shift != 0)[:, None] & ~biased[..., None])


def _note(target: Target, rows: int, unknowns: int) -> str:
    notes = ["fewer rows than unknowns"] if rows < unknowns else []
    notes += [] if bool(target.biased.any()) else ["no bias takes the mean shift"]
    return "; ".join(notes)


def families(
    readers: Sequence[Reader],
    corrected: Sequence[Reader],
    streams: Mapping[fx.Node, Stream],
    traced: TracedModule,
    references: References,
    samples: int,
) -> list[Family]:
    """The readers of a wave by what they read."""
    found: dict[object, list[Target]] = {}
    for reader in readers:
        stream = streams[reader.node] if reader in corrected else None
        found.setdefault(reader.key, []).append(Target(reader, traced, references, stream))
    return [Family(targets, samples) for targets in found.values()]
