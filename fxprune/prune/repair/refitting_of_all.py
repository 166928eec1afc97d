"""Reconstruction of modules that are spread over processes: the first one refits, and sends what it wrote."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxprune.borrowing import Borrowed, Loans
from fxprune.errors import ShardingError
from fxprune.graph.masks import view
from fxprune.graph.names import tensors_of
from fxprune.graph.spread_modules import by_loans, failing_together, is_spread, numbers_of, with_all_batches
from fxprune.graph.taking_back import taken_back
from fxprune.graph.traced import TracedModule
from fxprune.prune.repair.changes import mark_refitted, refitted_since, require_unchanged
from fxprune.prune.repair.new_biases import make_biases
from fxprune.prune.repair.report import ReconstructionReport
from fxprune.sharding import equal, followed, is_sharded, spread


@dataclass(frozen=True)
class _Told:
    """What the first process says of a reconstruction.

    Attributes:
        report: of it. numbers: of the parts of large tensors. small: the others, by name.
        biases: those that were made, by the weights of their layers. refitted: the parameters that were.
    """

    report: ReconstructionReport
    numbers: dict[str, int]
    small: dict[str, Tensor]
    biases: dict[str, Tensor]
    refitted: list[str]


def refitted_for_all(function: Callable[..., ReconstructionReport]) -> Callable[..., ReconstructionReport]:
    """Let a function that refits a module take modules that are spread, too.

    It runs on the first process with a borrowed copy, and with the batches of all.
    """
    signature = inspect.signature(function)

    @failing_together
    @functools.wraps(function)
    def call(traced: Any, *args: Any, **kwargs: Any) -> ReconstructionReport:
        if not is_spread(traced):
            return function(traced, *args, **kwargs)
        given = dict(signature.bind(traced, *args, **kwargs).arguments)
        if is_spread(given.get("reference")):
            raise ShardingError(
                "the reference is spread over processes. Give one that the first process has whole: the eager model, "
                "or a traced one that is not sharded."
            )
        if given.get("reference") is None:
            require_unchanged(traced)
        options = with_all_batches(traced, given, ["batches"])

        def work(copied: TracedModule) -> tuple[TracedModule, ReconstructionReport]:
            return copied, function(copied, **options)

        def tell(found: tuple[TracedModule, ReconstructionReport], loans: Loans) -> _Told:
            copied, report = found
            tensors = tensors_of(copied)
            made = {name: weight for name, weight in copied.made_biases.items() if name not in traced.made_biases}
            kept = {name: tensors[name] for name in tensors_of(traced)}
            small = {name: each.detach() for name, each in kept.items() if not isinstance(each, Borrowed)}
            biases = {weight: _unmasked(copied, name) for name, weight in made.items()}
            refitted = [name for name in refitted_since(copied) if name in kept]
            return _Told(report, numbers_of(kept, loans), small, biases, refitted)

        told, _, loans = by_loans(traced, work, tell)
        written: list[tuple[Tensor, Tensor]] = []
        for name, own in tensors_of(traced).items():
            values = loans.part(told.numbers[name]) if name in told.numbers else told.small[name]
            values = spread(values, own) if is_sharded(own) else values
            if name in told.refitted or not equal(own, values):
                written.append((own, values))
        with followed(traced), taken_back(traced, (own for own, _ in written)):
            with torch.no_grad():
                for own, values in written:
                    own.copy_(values)
            make_biases(traced, told.biases)
            mark_refitted(traced, told.refitted)
        return told.report

    return call


def _unmasked(copied: TracedModule, name: str) -> Tensor:
    """The values of a parameter, plain, before its mask."""
    tensor = view(copied, name).original
    assert tensor is not None, name
    return tensor.whole().clone() if isinstance(tensor, Borrowed) else tensor.detach()
