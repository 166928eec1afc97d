"""Channels of modules that are spread over processes: the first chooses, as one process does, and sends the masks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fxprune import driver
from fxprune.borrowing import Loans
from fxprune.errors import ShardingError
from fxprune.graph.masks import masked_views
from fxprune.graph.spread_modules import (
    by_loans,
    failing_together,
    is_spread,
    numbers_of,
    sent_masks,
    with_all_batches,
)
from fxprune.graph.traced import TracedModule
from fxprune.prune.channel_report import ChannelReport
from fxprune.prune.decisions import kept_here


def chosen_for_all(function: Callable[..., ChannelReport]) -> Callable[..., ChannelReport]:
    """Let a function that masks channels take modules that are spread, too.

    It runs on the first process with a borrowed copy, and with the batches of all. Decided counts go to every process.
    """
    signature = inspect.signature(function)

    @failing_together
    @functools.wraps(function)
    def call(traced: Any, *args: Any, **kwargs: Any) -> ChannelReport:
        if not is_spread(traced):
            return function(traced, *args, **kwargs)
        given = dict(signature.bind(traced, *args, **kwargs).arguments)
        if given.get("compact_masks"):
            raise ShardingError(
                "compact_masks=True was asked for a module that is spread over processes, whose masks are spread as "
                "its parameters are. Leave it out: each process holds its part."
            )
        given["compact_masks"] = False
        most = given.pop("max_batches", None)
        one_call = (Tensor, Mapping, tuple) if given.get("importance") == "obs" else ()
        options = with_all_batches(traced, given, ["loader"], most=most, one_call=one_call)

        def work(copied: TracedModule) -> tuple[TracedModule, ChannelReport]:
            report = function(copied, **options)
            copied.decide(copied.decided, kept_here(copied.decided_by))
            return copied, report

        def masks_of(copied: TracedModule) -> dict[str, Tensor]:
            return {own.name: own.mask for own in masked_views(copied) if own.mask is not None}

        def tell(
            found: tuple[TracedModule, ChannelReport], loans: Loans
        ) -> tuple[ChannelReport, list[str], frozenset[Any], dict[str, int]]:
            masks = masks_of(found[0])
            return found[1], [*masks], found[0].decided, numbers_of(masks, loans)

        (report, names, decided, numbers), result, loans = by_loans(traced, work, tell)
        copied = result[0][0] if result else None
        masks = None if copied is None else masks_of(copied)
        driver.insert_masks(traced, sent_masks(traced, masks, names, numbers, loans))
        traced.decide(decided, None if copied is None else copied.decided_by)
        return report

    return call
