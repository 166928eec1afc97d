"""`fxprune.latency_table`: the layers that touch each group, cut out of the graph and timed with fewer units."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.utils._pytree as pytree
from numpy.typing import NDArray
from torch import Tensor, fx

from fxprune import driver
from fxprune.calling import named_arguments
from fxprune.capture.front_end import trace
from fxprune.channels.budget import MOVED, Rounding, masks
from fxprune.channels.computed_weights import with_plain_weights
from fxprune.channels.groups import ChannelGroup, Grouping, steps_of
from fxprune.channels.ids import Vector
from fxprune.errors import ArgumentError, ArgumentTypeError, FxpruneError, PruningError
from fxprune.graph.batch import Batch
from fxprune.graph.interpretation import Interpreter
from fxprune.graph.names import parameter_count, tensor_at
from fxprune.graph.requirements import require_eval, require_list
from fxprune.graph.samples import stretched
from fxprune.graph.sharing_copies import sharing_copy
from fxprune.graph.spread_modules import lent_to_first
from fxprune.graph.traced import TracedModule
from fxprune.progress import working
from fxprune.prune.channel_request import ChannelRequest, chosen_among
from fxprune.prune.latency.pieces import Piece, cut_out, shape_of_cut, zeroed
from fxprune.prune.latency.table import LatencyCurve, LatencyTable
from fxprune.prune.losses import are_losses

KEPT = (0.75, 0.5, 0.25)  # shares of the units at which a group is measured, beside all of them
LEAST = 0.003  # share of the whole work below which layers are not measured
AT_ONCE = 4  # pieces that are exported together; between lots the time is looked at
ENOUGH = 0.02  # error of what is saved, as a share of the most, that is small
PARTS = 5  # of the rounds, by which the error of a quantile is told


PRICES = ("auto", "latency", "macs")


class Clock(Protocol):
    """Tells how long modules take."""

    def whole(self, traced: TracedModule) -> float:
        """The seconds that a module takes, finalized as it is."""

    def parts(
        self, sets: Sequence[Sequence[TracedModule]], is_sure: Callable[[NDArray[Any]], bool]
    ) -> Sequence[NDArray[Any]]:
        """For each set of finalized modules their seconds in rounds, [rounds, modules], until these are sure."""


@named_arguments
@lent_to_first()
def latency_table(
    traced: TracedModule,
    *,
    targets: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] = (),
    kinds: str | Iterable[str] | None = None,
    threads: int = 1,
    batch: int = 1,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    most_seconds: float = 60.0,
) -> LatencyTable:
    """Measure how long the layers that touch each group of channels run in onnxruntime, by how many units are left.

    For each group, what lies between the layers that write it and those that read it is cut out of the graph, and
    timed with all units, three quarters, half and a quarter of them, in multiples that run fast, one after the other in
    turns of random order. Layers of the same form are measured once: those of a transformer are one. Times are lower
    quartiles, since other work of the machine makes none shorter. Nothing is changed.

    Tables of latencies for structures are those of Kurtic et al., "ZipLM" (2023), https://arxiv.org/abs/2302.04089.

    Args:
        traced: a module with an eval graph. Its sample inputs say at which sizes it is measured, `batch` aside.
        targets, ignore, kinds: the groups to measure, as for `fxprune.prune.channels`; all that a budget may cut.
        threads, batch, providers: as for `fxprune.prune.channels`; a batch that is not free is the sample's.
        most_seconds: when no more is measured, what takes most first; at least one lot of layers is.

    Returns:
        A `LatencyTable`, which prints as a summary and has `table()`.

    Raises:
        ArgumentError, ArgumentTypeError: an unusable option. NameLookupError: a pattern matches nothing.
        PruningError: nothing may be pruned. CompareError: a provider cannot be run.

    Example:
        >>> table = fxprune.latency_table(traced)
        >>> print(table.table())
        >>> report = fxprune.prune.channels(traced, speedup=1.5, importance=sensitivity, prices=table)
    """
    require_eval(traced, "latency_table", PruningError)
    require_list("providers", providers)
    if isinstance(most_seconds, bool) or not isinstance(most_seconds, int | float):
        raise ArgumentTypeError(f"most_seconds={most_seconds!r}: a number is needed.")
    if not most_seconds > 0:
        raise ArgumentError(f"most_seconds={most_seconds}: more than 0 is needed.")
    grouping = Grouping(with_plain_weights(driver.plain_view(traced)))
    groups = chosen_among(grouping.groups, targets, ignore, kinds)
    return measured_latencies(traced, grouping, groups, Timing(threads, batch, tuple(providers), most_seconds))


@dataclass(frozen=True)
class Timing:
    """How latencies are measured; as the arguments of `latency_table`."""

    threads: int
    batch: int
    providers: tuple[str, ...]
    most_seconds: float = 60.0

    def clock(self) -> AbstractContextManager[Clock]:
        """The clock of onnxruntime."""
        return driver.clock(threads=self.threads, batch=self.batch, providers=self.providers)


def check_prices(prices: str | LatencyTable, request: ChannelRequest, timing: Timing) -> None:
    """Raise where prices are none, or would be ignored, or were measured in another way."""
    if not isinstance(prices, LatencyTable) and prices not in PRICES:
        told = f"prices={prices!r}" if isinstance(prices, str) else f"prices is a {type(prices).__name__}"
        raise ArgumentError(f"{told}: one of {', '.join(PRICES)} or a fxprune.latency_table is needed.")
    if prices == "auto":
        return
    if not request.asks_for("speedup"):
        raise ArgumentError("prices would be ignored: they are of time, for speedup. Give speedup, or leave them out.")
    if not are_losses(request.importance):
        raise ArgumentError(
            'prices would be ignored: they weigh losses of the output. Ask for importance="obs", or give a '
            "fxprune.sensitivity as importance."
        )
    if isinstance(prices, LatencyTable):
        own, given = (prices.threads, prices.batch, prices.providers), (timing.threads, timing.batch, timing.providers)
        if own != given:
            raise ArgumentError(
                f"the latencies were measured with threads, batch and providers {own}, and the speed is to be with "
                f"{given}. Measure again: fxprune.latency_table."
            )


def measured_latencies(
    traced: TracedModule, grouping: Grouping, groups: Sequence[ChannelGroup], timing: Timing
) -> LatencyTable:
    """The table of some groups."""
    start = time.perf_counter()
    together: dict[int, list[ChannelGroup]] = {}
    for i, group in enumerate(groups):
        together.setdefault(group.block if group.block >= 0 else -1 - i, []).append(group)
    values = _values(grouping, timing.batch)
    cuts = [_Cuts.of(grouping, values, each) for each in together.values()]
    del values
    with timing.clock() as clock, working("latencies", len(cuts)) as work:
        whole = clock.whole(traced)
        waiting = _by_form(cuts)
        needed = grouping.dense[0] + MOVED * grouping.dense[2]
        for first in range(0, len(waiting), AT_ONCE):
            if first and time.perf_counter() - start > timing.most_seconds:
                _leave(waiting[first:], f"not measured within {timing.most_seconds:g} s")
                break
            lot = waiting[first : first + AT_ONCE]
            _leave([each for each in lot if sum(one.work for one in each) < LEAST * needed], "next to no work")
            _measure([each for each in lot if not each[0].why], clock)
            work.advance(sum(map(len, lot)))
    curves = {id(group): curve for each in cuts for group, curve in zip(each.groups, each.curves(), strict=True)}
    found = tuple(curves[id(group)] for group in groups)
    pieces = sum(bool(each[0].seconds) for each in waiting)
    return LatencyTable(
        found, whole, _rate(groups, found), timing.threads, timing.batch, timing.providers, groups[0].sample, pieces,
        time.perf_counter() - start,
    )  # fmt: skip


def _rate(groups: Sequence[ChannelGroup], curves: Sequence[LatencyCurve]) -> float:
    """Seconds for one MAC, by what half of the units save of both."""
    pairs = [(group, curve.saved()) for group, curve in zip(groups, curves, strict=True) if not curve.why]
    seconds = sum(float(saved[group.size // 2]) for group, saved in pairs)
    macs = sum(group.macs * (group.size // 2) for group, _ in pairs)
    return seconds / macs if seconds > 0 and macs else 1.0


class _Cuts:
    """Groups that lose units together, the piece that they touch, and what it takes with fewer units.

    Attributes:
        groups: the groups. work: their MACs and traffic. piece: what they touch, where it can be run.
        form: the same for those that take as long. cuts: by count of steps the masks, without the first.
        gone: by cut, 0 first, the units of each group that are gone. why: why it has no latencies.
        seconds, errors: by cut.
    """

    def __init__(self, groups: Sequence[ChannelGroup]) -> None:
        self.groups = groups
        self.work = sum((group.macs + MOVED * group.traffic) * group.size for group in groups)
        self.piece: Piece | None = None
        self.form = ""
        self.cuts: list[Mapping[str, Tensor]] = []
        self.gone: list[list[int]] = [[0] * len(groups)]
        self.why = ""
        self.seconds: list[float] = []
        self.errors: list[float] = []

    @classmethod
    def of(cls, grouping: Grouping, values: Mapping[fx.Node, Any], groups: Sequence[ChannelGroup]) -> _Cuts:
        found = cls(groups)
        units = np.concatenate([group.units for group in groups])
        try:
            found.piece = cut_out(grouping, values, grouping.units.dead(units))
        except PruningError as error:
            found.why = f"its layers cannot be run alone: {error}"
            return found
        steps = steps_of(groups)
        for level in _levels(groups, len(steps)):
            own: Vector = steps[:level][steps[:level] >= 0]
            alive = grouping.consistency.settle(~grouping.units.dead(own))
            found.cuts.append(zeroed(found.piece, masks(grouping, alive)))
            found.gone.append([int(np.isin(group.units, own).sum()) for group in groups])
        if not found.cuts:
            found.why = "too few units to cut"
        found.form = "\n".join([found.piece.form, *map(shape_of_cut, found.cuts)])
        return found

    def modules(self) -> list[TracedModule]:
        """The piece, finalized as it is and with each cut.

        Raises:
            FxpruneError: it cannot be captured, or stays as large.
        """
        assert self.piece is not None
        traced = trace(self.piece.module, self.piece.inputs, dynamic_shapes=None, modes=("eval",))
        found = []
        for cut in ({}, *self.cuts):
            candidate = sharing_copy(traced)
            if cut:
                driver.insert_masks(candidate, cut)
            found.append(driver.finalize(candidate, align=1, verify=False))
        sizes = [*map(parameter_count, found)]
        if any(size >= sizes[0] for size in sizes[1:]):
            raise PruningError("they lose no channels without the layers before them")
        return found

    def curves(self) -> list[LatencyCurve]:
        """A curve for each group."""
        total = max(sum(group.macs * group.size for group in self.groups), 1)
        found = []
        for place, group in enumerate(self.groups):
            told = group.name, group.kind, group.size, tuple(map(str, group.members)), tuple(group.units.tolist())
            if not self.seconds:
                found.append(LatencyCurve(*told, why=self.why))
                continue
            counts = tuple(gone[place] for gone in self.gone)
            share = group.macs * group.size / total if len(self.groups) > 1 else 1.0
            curve = LatencyCurve(*told, counts, tuple(self.seconds), tuple(self.errors), share)
            if curve.is_noise():
                curve = LatencyCurve(*told, counts, tuple(self.seconds), tuple(self.errors), share, "too noisy")
            found.append(curve)
        return found


def _levels(groups: Sequence[ChannelGroup], steps: int) -> list[int]:
    """How many steps are taken where a group is measured: multiples that run fast stay."""
    parts = max(group.parts.shape[1] for group in groups)
    whole = steps // parts
    multiple = Rounding("auto", 1.0, 1).multiple_of_steps(groups)
    left = (max(multiple, math.floor(share * whole / multiple + 0.5) * multiple) for share in KEPT)
    return sorted({(whole - each) * parts for each in left if 0 < each < whole})


def _values(grouping: Grouping, batch: int) -> dict[fx.Node, Any]:
    """The values of the eval graph's nodes on the sample inputs, with so many samples where the batch is free."""
    plain = grouping.plain
    graph = plain.graphs["eval"]
    leaves = pytree.tree_leaves((plain.example_args, plain.example_kwargs))
    own = Batch.of(graph)
    if own.is_free:
        places = [node for node in graph.nodes if node.op == "placeholder"]
        sizes = {
            (i, 0): batch
            for i, node in enumerate(places)
            if node in own.inputs
            and isinstance(node.meta["val"].shape[0] if node.meta["val"].dim() else 0, torch.SymInt)
        }
        leaves = stretched(leaves, sizes)
    found: dict[fx.Node, Any] = {}
    runner = Interpreter(graph, lambda name: tensor_at(plain, name).detach(), watch=found.__setitem__)
    with torch.no_grad():
        runner.run(*leaves, enable_io_processing=False)
    return found


def _by_form(cuts: Sequence[_Cuts]) -> list[list[_Cuts]]:
    """Those that can be measured, together where they take as long; what takes most first."""
    found: dict[str, list[_Cuts]] = {}
    for each in cuts:
        if not each.why:
            found.setdefault(each.form, []).append(each)
    return sorted(found.values(), key=lambda alike: -sum(each.work for each in alike))


def _leave(waiting: Iterable[Sequence[_Cuts]], why: str) -> None:
    for alike in waiting:
        for each in alike:
            each.why = why


def _measure(lot: Sequence[Sequence[_Cuts]], clock: Clock) -> None:
    """Time one piece of each, for all that are alike."""
    sets, measured = [], []
    for alike in lot:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what is cut out to be timed
                sets.append(alike[0].modules())
            measured.append(alike)
        except FxpruneError as error:
            _leave([alike], f"its layers cannot be run alone: {str(error).partition(chr(10))[0]}")
    for alike, rounds in zip(measured, clock.parts(sets, is_sure) if sets else (), strict=True):
        seconds, errors = summary(rounds)
        for each in alike:
            each.seconds, each.errors = seconds, errors


def is_sure(rounds: NDArray[Any]) -> bool:
    """Whether the errors of what is saved are small beside the most that is."""
    seconds, errors = summary(rounds)
    return max(errors) <= ENOUGH * (seconds[0] - min(seconds))


def summary(rounds: NDArray[Any]) -> tuple[list[float], list[float]]:
    """By column of [rounds, modules] the lower quartile, and the standard error of its distance to the first's."""
    seconds = np.quantile(rounds, 0.25, axis=0)
    parts = np.array(
        [np.quantile(part, 0.25, axis=0) for part in (rounds[i::PARTS] for i in range(PARTS)) if len(part)]
    )
    saved = parts[:, :1] - parts
    errors = saved.std(0, ddof=1) / math.sqrt(len(parts)) if len(parts) > 1 else np.zeros(len(seconds))
    return seconds.tolist(), errors.tolist()
