"""Choices of channels that can be made again: a smaller budget ends where it would have ended at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch

from fxprune.borrowing import Borrowed, asked
from fxprune.by_parts import checksum
from fxprune.graph.masks import masked_views, view
from fxprune.graph.names import locate
from fxprune.graph.reparametrizations import computed_names
from fxprune.graph.sharing_copies import sharing_copy
from fxprune.graph.traced import TracedModule
from fxprune.prune.channel_request import ChannelRequest
from fxprune.prune.importance_registry import IMPORTANCES

_Contents = tuple[int, ...]  # by tensor, and by part


@dataclass(frozen=True)
class Decision:
    """A choice of channels that was made, and what the module was right after it.

    Attributes:
        request: what was asked for.
        masks: the parameters that it masked, or one that it took the place of, with their masks of before; None where
            they had none.
        contents: of the module's parameters and masks.
    """

    request: ChannelRequest
    masks: Mapping[str, torch.Tensor | None]
    contents: _Contents


def undone(traced: TracedModule, request: ChannelRequest) -> tuple[TracedModule, Mapping[str, torch.Tensor | None]]:
    """A copy of the module as it was before channels were chosen, and the masks of before, as in `Decision`.

    It shares tensors with the module, and is only to be read. It is the module itself, and nothing, unless the request
    asks for more of what was asked for last, by scores that depend on weights alone, and neither weights nor masks have
    changed since.
    """
    decision = traced.decided_by
    if not isinstance(decision, Decision) or not _asks_for_more(request, decision.request):
        return traced, {}
    if _contents(traced) != decision.contents:
        return traced, {}
    before = sharing_copy(traced)
    for name, mask in decision.masks.items():
        own = view(before, name)
        assert own.mask is not None, name
        own.replace_mask(own.mask.new_ones(()).expand(own.mask.shape) if mask is None else mask, compact=True)
    return before, decision.masks


def kept_here(decision: object) -> object:
    """A decision whose masks are this process's own, for a module whose tensors it borrowed."""
    if not isinstance(decision, Decision):
        return decision
    masks = {name: _as_plain(mask) if isinstance(mask, Borrowed) else mask for name, mask in decision.masks.items()}
    return replace(decision, masks=masks)


def _as_plain(mask: Borrowed) -> torch.Tensor:
    plain = mask.whole()
    small = plain != 0
    return small if torch.equal(small.to(plain.dtype), plain) else plain.clone()


def record(
    traced: TracedModule,
    request: ChannelRequest,
    axes: Collection[tuple[str, int]],
    masks: Mapping[str, torch.Tensor | None],
) -> None:
    """Note on a module which counts of channels are decided now, and by what.

    Args:
        traced: the module, its masks inserted.
        request: what was asked for.
        axes: those that are decided.
        masks: of before, as in `Decision`.
    """
    traced.decide(axes, Decision(request, masks, _contents(traced)))


def _asks_for_more(request: ChannelRequest, earlier: ChannelRequest) -> bool:
    pairs = [*zip(request.budgets, earlier.budgets, strict=False)]
    alike = all(name == other and type(value) is type(before) for (name, value), (other, before) in pairs)
    if not alike or replace(request, budgets=earlier.budgets) != earlier or request.asks_for("speedup"):
        return False
    if len(request.budgets) != len(earlier.budgets):
        return False
    importance = request.importance
    if not callable(importance) and IMPORTANCES[importance].slices is None:
        return False
    return all(value >= before if name == "amount" else value <= before for (name, value), (_, before) in pairs)


def _contents(traced: TracedModule) -> _Contents:
    """What tells a module's weights and masks from others, however they were written: checksums of their bytes.

    CRC-32 finds every change of one entry and every exchange of two, and misses others once in four billion times.
    Counters of versions would miss writes to `.data`. Of what processes hold in parts each sums up its own.
    """
    tensors = [*traced.parameters(), *(own.mask for own in masked_views(traced) if own.mask is not None)]
    normed = {locate(traced, name)[0] for name in computed_names(traced)}
    tensors += [buffer for module in normed for buffer in module.buffers()]  # a spectral norm's vectors
    return tuple(found for tensor in tensors for found in asked(tensor, checksum))
