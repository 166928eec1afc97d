"""Choices of channels that can be made again: a smaller budget ends where it would have ended at once."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

from fxprune.graph.masks import masked, masked_views, view
from fxprune.graph.traced import TracedModule
from fxprune.prune.channel_request import ChannelRequest
from fxprune.prune.importance_registry import IMPORTANCES

# by tensor the sums of its entries and of every third, which no training leaves as they are
_Contents = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Decision:
    """A choice of channels that was made, and what the module was right after it.

    Attributes:
        request: what was asked for.
        masks: the parameters whose masks are those of this choice, or of one that it took the place of, alone.
        contents: of the module's parameters and masks.
    """

    request: ChannelRequest
    masks: frozenset[str]
    contents: _Contents


def undone(traced: TracedModule, request: ChannelRequest) -> tuple[TracedModule, frozenset[str]]:
    """A copy of the module as it was before channels were chosen, and the parameters whose masks are ones there.

    It is the module itself, and nothing, unless the request asks for more of what was asked for last, by scores that
    depend on weights alone, and neither weights nor masks have changed since.
    """
    decision = traced.decided_by
    if not isinstance(decision, Decision) or not _asks_for_more(request, decision.request):
        return traced, frozenset()
    if _contents(traced) != decision.contents:
        return traced, frozenset()
    before = copy.deepcopy(traced)
    for name in decision.masks:
        own = view(before, name)
        assert own.mask is not None, name
        own.replace_mask(torch.ones_like(own.mask))
    return before, decision.masks


def record(
    traced: TracedModule, request: ChannelRequest, axes: Collection[tuple[str, int]], inserted: frozenset[str] | None
) -> None:
    """Note on a module which counts of channels are decided now, and by what.

    Args:
        traced: the module, its masks inserted.
        request: what was asked for.
        axes: those that are decided.
        inserted: the parameters whose masks are those of the choice alone; None where others were there before.
    """
    contents = None if inserted is None else _contents(traced)
    decision = None if inserted is None or contents is None else Decision(request, inserted, contents)
    traced.decide(axes, decision)


def untouched(module: TracedModule, hidden: Collection[str], names: Collection[str]) -> frozenset[str] | None:
    """The parameters that a choice masks alone, as for `record`; `module` and `hidden` are as from `undone`."""
    others = set(masked(module)) - set(hidden)
    return None if others & set(names) else frozenset(names) | frozenset(hidden)


def mask_values(module: TracedModule, names: Collection[str]) -> dict[str, torch.Tensor]:
    """The masks of some parameters, by name."""
    return {name: mask for name in names if (mask := view(module, name).mask) is not None}


def _asks_for_more(request: ChannelRequest, earlier: ChannelRequest) -> bool:
    value, before = request.value, earlier.value
    if replace(request, value=before) != earlier or type(value) is not type(before) or request.budget == "speedup":
        return False
    importance = request.importance
    if not callable(importance) and IMPORTANCES[importance].slices is None:
        return False
    return value >= before if request.budget == "amount" else value <= before


def _contents(traced: TracedModule) -> _Contents | None:
    """What tells a module's parameters and masks from others, None where torch has no sums of their dtype."""
    tensors = [*traced.parameters(), *(own.mask for own in masked_views(traced) if own.mask is not None)]
    found = []
    for tensor in tensors:
        values = tensor.detach().reshape(-1)
        if values.is_floating_point() and values.dtype.itemsize == 1:
            return None
        found.append((values.sum().item(), values[::3].sum().item()))
    return tuple(found)
