"""`reconstruct`: one sweep over a masked network and its reference, side by side, that refits every reader."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune import driver
from fxprune.errors import ArgumentError, ArgumentTypeError, PruningError
from fxprune.graph.masks import view
from fxprune.graph.names import tensor_at
from fxprune.graph.requirements import require_eval, require_flag
from fxprune.graph.seeding import seeded
from fxprune.graph.text import describe
from fxprune.graph.traced import TracedModule
from fxprune.progress import working
from fxprune.prune.repair import input_moments
from fxprune.prune.repair.batches import Batches
from fxprune.prune.repair.changes import Changes, require_unchanged
from fxprune.prune.repair.finding import Stream, find, mask_product, stream_of
from fxprune.prune.repair.finite import has_non_finite, origin_of_non_finite
from fxprune.prune.repair.fitting import Family, Solved, families
from fxprune.prune.repair.judging import Judge, parts
from fxprune.prune.repair.layers import Reader
from fxprune.prune.repair.new_biases import biasable, make_biases
from fxprune.prune.repair.normed import carry, weight_norms
from fxprune.prune.repair.pair import Pair
from fxprune.prune.repair.pieces import Pieces
from fxprune.prune.repair.references import References
from fxprune.prune.repair.refitting_of_all import refitted_for_all
from fxprune.prune.repair.report import ReaderRepair, ReconstructionReport
from fxprune.prune.repair.shelf import Shelf, State
from fxprune.prune.repair.stacks import in_single_layers
from fxprune.prune.repair.states import find_states
from fxprune.prune.repair.turning import Turning
from fxprune.prune.repair.waves import Layout, Wave, plan

_MOST_ROUNDS = 3
_TAKEN_BACK = "taken back: outputs were further off with it"
_DAMPINGS = (1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)


@refitted_for_all
def reconstruct(
    traced: TracedModule,
    batches: Any,
    *,
    damping: float | Iterable[float] = _DAMPINGS,
    reference: nn.Module | None = None,
    weight: Callable[..., Tensor] | None = None,
    new_biases: bool = True,
) -> ReconstructionReport:
    """Refit what is alive to do the work of what is masked, without labels, gradients or training.

    The masked network and the same one without its masks run side by side. Each reader in turn (linear layers, products
    with a matrix, convolutions of all kinds, the weights of recurrent layers, gains of normalizations) gets as
    live weights and bias the ridge least-squares fit, towards the weights that were there, of what it computes in the
    reference, from what it receives now that the readers before it are refitted. Where its output is added to a stream,
    its target includes what the stream is missing. Masks stay masks: what is masked stays as it is, and training,
    schedules, `finalize`, `save` and export go on as they do.

    One sample in five is held back: on these the damping is chosen, and a reader whose fit does not lower its error
    there keeps its weights. Once that is decided, they are fitted too. At the end the outputs on held-back samples are
    compared with the reference's: fits without which they are closer are taken back, all of them where the module was
    closer as it was. Heads of attention that lose some of their channels first get a basis in which these matter least.

    Where a reader has no bias, and a batch norm follows at once, the running mean of that takes up the mean shift.
    Other layers without a bias get one, a parameter under torch's name, where that leaves less of the error on
    held-back samples. A reader that is called several times is fitted to all of its calls. On a terminal, a line says
    how far the sweep is.

    Sources: least squares over the inputs, Hassibi and Stork, "Second order derivatives for network pruning: Optimal
    Brain Surgeon" (1993), https://proceedings.neurips.cc/paper/1992/hash/303ed4c69846ab36c2904d3ba8573050; layer after
    layer, with what a stream is missing, He, Zhang and Sun, "Channel Pruning for Accelerating Very Deep Neural
    Networks" (2017), https://arxiv.org/abs/1707.06168; a support for each row, Frantar and Alistarh, "SparseGPT"
    (2023), https://arxiv.org/abs/2301.00774.

    Args:
        traced: the masked module, changed in place; its eval graph is what runs, in whichever mode it is.
        batches: inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, a `fxprune.Call` of
            both, or a list, loader or generator of these. At least two samples. Values between two readers lie in a
            temporary folder where they need more than 2 GiB.
        damping: what is added to the diagonal of the inputs' second moments, relative to its mean; of several, each
            reader gets the one with the least error on held-back samples.
        reference: the network to approach, traced or eager, with parameters of the same names and shapes; None:
            `traced` without its masks. Once weights have changed since they were masked, by training or by another
            reconstruction, it has to be given.
        weight: called as the module is, gives the rows that count: a tensor [samples], or [samples, positions], zero
            for padding. Readers whose outputs begin with other sizes count all rows.
        new_biases: whether linear layers, products with a matrix and convolutions that have no bias may get one. The
            report names those that were made: an optimizer that exists does not hold them, and the model that was
            traced has no such keys.

    Returns:
        A `ReconstructionReport`: errors before and after on held-back samples, what was left alone, and why.

    Raises:
        InputError: batches hold labels, or inputs of another form.
        ArgumentError, ArgumentTypeError: fewer than two samples, an unusable option, or a reference that does not fit.
        PruningError: nothing is masked, nothing can be refitted, or NaN or inf come up; the message has the node.
            The parameters are as they were then.

    Example:
        >>> fxprune.prune.channels(traced, macs=0.5)
        >>> report = fxprune.reconstruct(traced, batches)
        >>> final = fxprune.finalize(traced)
    """
    start = time.perf_counter()
    require_eval(traced, "reconstruct", PruningError)
    dampings = _dampings(damping)
    require_flag("new_biases", new_biases)
    changes, norms = Changes(), weight_norms(traced)
    with torch.no_grad(), seeded(traced):
        if reference is None:
            require_unchanged(traced)
        plain = driver.without_norms(traced, norms)
        try:
            references = References(plain, plain.graphs["eval"], reference, changes)
            sweep = _Sweep(plain, references, changes, new_biases, norms)
            readers, samples, output = sweep.run(Batches(plain, sweep.graph, batches, weight), dampings)
            carry(plain, traced, norms, changes)
        except BaseException:
            changes.undo()
            raise
        changes.keep()
    made = make_biases(traced, sweep.made)
    return ReconstructionReport(readers, sweep.alone, samples, time.perf_counter() - start, made, output)


def _dampings(damping: Any) -> tuple[float, ...]:
    given = tuple(damping) if isinstance(damping, Iterable) and not isinstance(damping, str) else (damping,)
    for value in given:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ArgumentTypeError(f"damping={damping!r}: a number is needed, or several.")
        if not math.isfinite(value) or value < 0:
            raise ArgumentError(f"damping={damping!r}: numbers of 0 or more are needed.")
    if not given:
        raise ArgumentError("damping is empty: at least one number is needed.")
    return given


class _Sweep:
    """What is to be refitted of a module, and how.

    Attributes:
        graph: the eval graph. readers: those to refit. alone: why others are left alone.
        made: by the weight of a reader, the bias that it is to get; of `normed` weights none does.
    """

    def __init__(
        self,
        traced: TracedModule,
        references: References,
        changes: Changes,
        new_biases: bool,
        normed: Collection[str],
    ) -> None:
        self.traced, self.references, self.changes = traced, references, changes
        self.graph = in_single_layers(traced.graphs["eval"])
        self.found, alone = find(traced, self.graph)
        states, states_alone = find_states(traced, self.graph)
        readers = [*self.found, *states]
        products = {node: mask_product(traced, node) for node in self.graph.nodes}
        self.unmasked = {node: operand for node, operand in products.items() if operand is not None}
        sources = self._sources()
        if not sources:
            raise PruningError(
                "nothing is masked, so there is nothing to reconstruct. Mask first, by fxprune.prune.channels or "
                "another of its methods, or give the reference that the module was."
            )
        layout = Layout.of(self.graph, [call.node for reader in readers for call in reader.calls], sources)
        self.alone = {
            each.name: each.why for node, each in (*alone.items(), *states_alone.items()) if node in layout.differing
        }
        self.streams = _streams(readers)
        self.readers = [reader for reader in readers if self._is_to_fit(reader, layout)]
        if not self.readers:
            why = "; ".join(f"{name}: {reason}" for name, reason in self.alone.items()) or "no contraction reads it"
            cure = (
                " Norms are taken away by fxprune.remove_spectral_norm and fxprune.remove_weight_norm; masks stay."
                if "is computed" in why
                else ""
            )
            raise PruningError(f"no reader can be refitted: {why}.{cure}")
        ends = [call.node for reader in self.readers for call in reader.calls]
        ends += [self.streams[node].other for node in ends if node in self.streams]
        # what changes before the reference is done with it
        means = {reader.moving_mean for reader in self.readers}
        shared = {id(each) for reader in self.readers if reader.further for each in self._parameters(reader)}
        for node in self.graph.find_nodes(op="get_attr"):
            if node.target in means or id(tensor_at(traced, str(node.target))) in shared:
                sources.append(node)
        self.layout = Layout.of(self.graph, ends, sources)
        self.made: dict[str, Tensor] = {}
        self._biasable = (biasable(traced, self.readers) if new_biases else frozenset[str]()) - set(normed)

    def _sources(self) -> list[fx.Node]:
        """Where the two networks have other values from the start."""
        found = []
        for node in self.graph.nodes:
            if node in self.unmasked:
                masks = [each for each in node.all_input_nodes if each is not self.unmasked[node]]
                if not bool((tensor_at(self.traced, str(masks[0].target)) == 1).all()):
                    found.append(node)
            elif node.op == "get_attr" and self.references.differs(str(node.target)):
                found.append(node)
        return found

    def _parameters(self, reader: Reader) -> list[Tensor | None]:
        return [view(self.traced, name).original for name in (*reader.weights, *reader.biases) if name is not None]

    def _is_to_fit(self, reader: Reader, layout: Layout) -> bool:
        """Whether a reader lacks anything; says of the others why they are left alone."""
        found = [view(self.traced, name) for name in reader.weights]
        support = reader.table([each.value() if each.mask is None else each.mask for each in found]) != 0
        alive = support.any(-1) if any(each.mask is not None for each in found) else None
        if alive is not None and not bool(alive.any()):
            self.alone[reader.name] = "all of its outputs are masked"
            return False
        if not any(call.node in layout.differing for call in reader.calls):
            return False  # nothing in front of it is masked either
        if reader.further and layout.is_strict:
            self.alone[reader.name] = (
                f"its weight is used by {len(reader.calls)} calls, and operators write into what others read"
            )
            return False
        if (columns := int(support.any(1).any(0).sum())) > input_moments.MOST_COLUMNS:
            self.alone[reader.name] = f"{columns:,} inputs of an output, more than {input_moments.MOST_COLUMNS:,}"
            return False
        if reader.reads_reference:
            return self._differs(reader, alive)
        lacking = [self.streams[call.node].other for call in reader.calls if call.node in self.streams]
        if not layout.differing.isdisjoint([*(call.data for call in reader.calls), *lacking]):
            return True
        if self._differs(reader, alive):
            return True
        self.alone[reader.name] = "it computes what the reference does"
        return False

    def _differs(self, reader: Reader, alive: Tensor | None) -> bool:
        """Whether the weights of what is alive, None for all, are others than the reference's."""
        own = reader.table([view(self.traced, name).value() for name in reader.weights])
        dense = reader.table([self.references.value(name) for name in reader.weights])
        return not torch.equal(own if alive is None else own[alive], dense if alive is None else dense[alive])

    def run(
        self, batches: Batches, dampings: Sequence[float]
    ) -> tuple[dict[str, ReaderRepair], tuple[int, int], tuple[float, float]]:
        """Fit every reader, in the order of the waves.

        Returns:
            What came of each, how many samples there were, and the errors of the outputs before and after.
        """
        at = dict[fx.Node, Reader]()
        for reader in self.readers:
            at.setdefault(reader.node, reader)
        waves = plan(self.layout, list(at.values()), self.streams)
        pair = Pair(
            self.graph, self.layout, waves, lambda target: tensor_at(self.traced, target), self.references,
            self.unmasked, self.streams,
        )  # fmt: skip
        repairs: dict[str, ReaderRepair] = {}
        with Shelf() as shelf, Shelf() as judged, working("reconstruct", len(at)) as work:
            judge = Judge(self.graph, self.references.unmasked, judged)
            pieces = self._started(batches, pair, shelf, judge)
            for number, wave in enumerate(waves):
                work.show(wave.readers[0].name if wave.readers else "")
                fit = self._settled if wave.tried else self._fitted
                for solved in fit(pair, number, shelf, pieces, dampings):
                    repairs[solved.reader.name] = solved.repair
                    if solved.new_bias is not None:
                        self.made[solved.reader.name] = solved.new_bias.flatten()
                        pair.biases |= {call.node: (solved.reader, solved.new_bias) for call in solved.reader.calls}
                work.advance(len(wave.readers))
            output = self._judged(judge, pair.biases, repairs)
        return repairs, pieces.samples, output

    def _started(self, batches: Batches, pair: Pair, shelf: Shelf, judge: Judge) -> Pieces:
        """The pieces, whose states before the first wave are on the shelf; heads have turned."""
        with Shelf() as inputs:
            pieces = Pieces(inputs)
            for piece in batches:
                pieces.add(piece)
                if piece.is_held:
                    judge.add(piece)
            turning = Turning(self.traced, self.graph, self.found, self.references, batches)
            if bases := turning.bases(next(iter(pieces))):
                turning.turn(bases, pieces, self.changes)
            for number in range(len(pieces)):
                shelf.put(number, pair.start(pieces.take(number).inputs))
        return pieces

    def _judged(
        self, judge: Judge, biases: dict[fx.Node, tuple[Reader, Tensor]], repairs: dict[str, ReaderRepair]
    ) -> tuple[float, float]:
        """The errors of the outputs before and after; fits that make the outputs worse are taken back."""

        def error(tensors: Callable[[Tensor], Tensor], shifts: Mapping[fx.Node, tuple[Reader, Tensor]]) -> float:
            def value(target: str) -> Any:
                found = tensor_at(self.traced, target)
                return tensors(found) if isinstance(found, Tensor) else found  # the body of control flow

            return judge.error(value, shifts)

        before, after = error(self.changes.first, {}), error(Tensor.detach, biases)
        if not after > before:
            return before, after
        order = {reader.name: reader for reader in self.readers}
        taken: list[Reader] = []
        for part in parts([order[name] for name, repair in repairs.items() if repair.damping is not None]):
            tensors = [each for reader in part for each in self._written(reader)]
            fitted = [each.detach().clone() for each in tensors]
            for tensor in tensors:
                self.changes.set(tensor, self.changes.before(tensor))
            calls = {call.node for reader in part for call in reader.calls}
            left = {node: bias for node, bias in biases.items() if node not in calls}
            if (without := error(Tensor.detach, left)) < after:
                after, biases, taken = without, left, [*taken, *part]
                continue
            for tensor, values in zip(tensors, fitted, strict=True):
                self.changes.set(tensor, values)
        if not after < before:
            self.changes.undo()
            after, taken = before, [order[name] for name in repairs]
        for reader in taken:
            repair = repairs[reader.name]
            if repair.damping is not None:
                repairs[reader.name] = replace(repair, after=repair.before, damping=None, note=_TAKEN_BACK)
            self.made.pop(reader.name, None)
        return before, after

    def _written(self, reader: Reader) -> list[Tensor]:
        """The tensors that a fit writes into."""
        found = [each for each in self._parameters(reader) if each is not None]
        return found if reader.moving_mean is None else [*found, tensor_at(self.traced, reader.moving_mean)]

    def _fitted(
        self,
        pair: Pair,
        number: int,
        shelf: Shelf,
        pieces: Pieces,
        dampings: Sequence[float],
    ) -> list[Solved]:
        """Run a wave over all pieces, and fit its readers."""
        start = time.perf_counter()
        found = self._gathered(pair, number, shelf, pieces, self._biasable)
        spent = (time.perf_counter() - start) / max(len(pair.waves[number].readers), 1)
        return [each for family in found for each in family.solve(dampings, self.changes, spent)]

    def _settled(
        self, pair: Pair, number: int, shelf: Shelf, pieces: Pieces, dampings: Sequence[float]
    ) -> list[Solved]:
        """Fit readers of which one call runs before another; those that read what they gave last, and several times."""
        start = time.perf_counter()
        wave = pair.waves[number]
        found = self._gathered(pair, number, shelf, pieces, ())
        moving = _moved_by_fits(wave)
        solved = [
            each
            for family in found
            if not family.reads_any(moving)
            for each in family.solve(dampings, self.changes, (time.perf_counter() - start) / len(found))
        ]
        if len(solved) == sum(len(family.targets) for family in found):
            return solved
        if solved:
            found = self._gathered(pair, number, shelf, pieces, ())
        return [*solved, *self._again(pair, number, shelf, pieces, dampings, found, moving)]

    def _again(
        self,
        pair: Pair,
        number: int,
        shelf: Shelf,
        pieces: Pieces,
        dampings: Sequence[float],
        found: Sequence[Family],
        moving: Collection[fx.Node],
    ) -> list[Solved]:
        """Fit readers that read what they gave: again and again, as long as they are better with what they give now."""
        start = time.perf_counter()
        found = [family for family in found if family.reads_any(moving)]
        first = kept = [error for family in found for error in family.errors()]
        solved: list[Solved] = []
        for _ in range(_MOST_ROUNDS):
            before = [each for family in found for each in family.values()]
            again = [each for family in found for each in family.solve(dampings, self.changes, 0.0)]
            found = [each for each in self._gathered(pair, number, shelf, pieces, ()) if each.reads_any(moving)]
            errors = [error for family in found for error in family.errors()]
            if sum(errors) >= sum(kept):
                for tensor, values in before:
                    self.changes.set(tensor, values)
                break
            solved, kept = again, errors
        spent = (time.perf_counter() - start) / len(first)
        if not solved:
            solved = [each.unchanged() for each in again]
        return [
            replace(each, repair=replace(each.repair, before=was, after=now, seconds=spent))
            for each, was, now in zip(solved, first, kept, strict=True)
        ]

    def _gathered(
        self, pair: Pair, number: int, shelf: Shelf, pieces: Pieces, biasable: Collection[str]
    ) -> list[Family]:
        """The readers of a wave by what they read, with the moments of all pieces."""
        wave = pair.waves[number]
        streams = {node: self.streams[node] for node in wave.corrected}
        readers = [own for reader in wave.readers for own in self._of_call(reader)]
        found = families(readers, streams, biasable, self.traced, self.references, pieces.samples[0])
        fixed = pair.fixed(number)
        for place, piece in enumerate(pieces.bare):
            state = shelf.take(place)
            current, reference = pair.run(number, state, fixed)
            values = pair.tried(number, current, reference)
            self._check(pair, number, state, *values)
            for family in found:
                family.add(*values, piece)
            shelf.put(place, state if wave.tried else pair.kept(number, current, reference))
        return found

    def _of_call(self, first: Reader) -> list[Reader]:
        """What is to be fitted of a call: a recurrent layer reads its input, and its state."""
        return [reader for reader in self.readers if reader.node is first.node]

    def _check(
        self, pair: Pair, number: int, state: State, current: Mapping[fx.Node, Any], reference: Mapping[fx.Node, Any]
    ) -> None:
        """Raise where a reader gets, or should give, NaN or inf."""
        readers = [own for reader in pair.waves[number].readers for own in self._of_call(reader)]
        for reader, call in ((each, call) for each in readers for call in each.calls):
            for node, network, values in (
                (call.data, "the masked network", current),
                (reader.told_by(call), "the reference", reference),
            ):
                if not has_non_finite(values[node]):
                    continue
                again = pair.run(number, state, pair.fixed(number), keep=True)
                again = pair.tried(number, *again, keep=True)
                origin = origin_of_non_finite(node, again[0] if values is current else again[1])
                raise PruningError(
                    f"NaN or inf come up in {network} at {describe(origin)}, in front of {reader.name!r}. Check the "
                    "batches, and the weights."
                )


def _moved_by_fits(wave: Wave) -> set[fx.Node]:
    """The nodes of what a wave runs for its fits whose values depend on what its readers give."""
    found = {call.node for reader in wave.readers for call in reader.calls}
    for node in wave.tried:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _streams(readers: Iterable[Reader]) -> dict[fx.Node, Stream]:
    """What the outputs of readers are added to."""
    found = {call.node: stream_of(call.end) for each in readers if each.gives_products for call in each.calls}
    return {node: stream for node, stream in found.items() if stream is not None}
