"""Scores of modules that are spread over processes: the first computes them, as one process does, and sends parts."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fxprune.borrowing import Loans
from fxprune.graph.masks import view
from fxprune.graph.spread_modules import (
    by_loans,
    failing_together,
    first_of_all,
    is_spread,
    numbers_of,
    with_all_batches,
)
from fxprune.graph.traced import TracedModule
from fxprune.sharding import sent, sent_object, spread

_BY_PARTS = ("l1", "l2")  # which each process computes from its parts alone


def scored_for_all(function: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Let a function that scores parameters take modules that are spread, too.

    It runs on the first process with a borrowed copy, and with the batches of all. Scores are spread as parameters are.
    """
    signature = inspect.signature(function)

    @failing_together
    @functools.wraps(function)
    def call(traced: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        given = dict(signature.bind(traced, *args, **kwargs).arguments)
        if not is_spread(traced) or given.get("importance", "l1") in _BY_PARTS:
            return function(traced, *args, **kwargs)
        most = given.pop("max_batches", None)
        options = with_all_batches(traced, given, ["loader"], most=most, one_call=())

        def work(copied: TracedModule) -> dict[str, Tensor]:
            return function(copied, **options)

        def tell(scores: Mapping[str, Tensor], loans: Loans) -> tuple[dict[str, torch.dtype], dict[str, int]]:
            return {name: score.dtype for name, score in scores.items()}, numbers_of(scores, loans)

        (dtypes, numbers), result, loans = by_loans(traced, work, tell)
        scores, found = result[0] if result else {}, {}
        for name, dtype in dtypes.items():
            own = view(traced, name)
            reference = own.original if own.original is not None else own.computed_from
            if reference is None:  # computed from parameters of other shapes
                found[name] = sent_object(scores.get(name), first_of_all(traced))
            elif name in numbers:
                found[name] = spread(loans.part(numbers[name]), reference)
            else:
                found[name] = sent(scores.get(name), torch.empty_like(reference.detach(), dtype=dtype))
        return found

    return call
