"""Channels of modules that are spread over processes: the first chooses, as one process does, and sends the masks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from fxprune import driver
from fxprune.graph.masks import masked, view
from fxprune.graph.spread_modules import all_batches, first_of_all, is_spread, on_first, sent_masks
from fxprune.graph.traced import TracedModule
from fxprune.prune.channel_report import ChannelReport


def chosen_for_all(function: Callable[..., ChannelReport]) -> Callable[..., ChannelReport]:
    """Let a function that masks channels take modules that are spread, too.

    It runs on the first process with a whole copy, and with the batches of all. Decided counts go to every process.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(traced: Any, *args: Any, **kwargs: Any) -> ChannelReport:
        if not is_spread(traced):
            return function(traced, *args, **kwargs)
        options = dict(signature.bind(traced, *args, **kwargs).arguments)
        del options["traced"]
        rank, failure = first_of_all(traced), None
        try:
            options["loader"] = all_batches(options.get("loader"), options.pop("max_batches", None), rank)
        except Exception as error:
            if dist.get_rank() != rank:
                raise
            failure = error

        def work(copied: TracedModule) -> tuple[TracedModule, ChannelReport]:
            if failure is not None:
                raise failure
            return copied, function(copied, **options)

        def tell(found: tuple[TracedModule, ChannelReport]) -> tuple[ChannelReport, list[str], frozenset[Any]]:
            return found[1], masked(found[0]), found[0].decided

        (report, names, decided), result = on_first(traced, work, tell)
        copied = result[0][0] if result else None
        masks = None if copied is None else {name: view(copied, name).mask for name in names}
        driver.insert_masks(traced, sent_masks(traced, masks, names))  # type: ignore[arg-type]
        traced.decide(decided, None if copied is None else copied.decided_by)
        return report

    return call
