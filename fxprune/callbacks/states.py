"""State dicts that bring their masks: what a trainer saved goes into a module that has none of them yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fxprune import driver
from fxprune.checkpoints.loading_states import masks_of, with_mask
from fxprune.graph.containers import put_in_order
from fxprune.graph.masks import mask_name, masked_attributes, original_name
from fxprune.graph.names import join
from fxprune.graph.requirements import require_traced
from fxprune.graph.states import check_state
from fxprune.graph.traced import TracedModule


def masks_from_states(traced: TracedModule) -> TracedModule:
    """Let every state dict that is loaded bring its masks, also where a module that holds the traced one loads it.

    A trainer loads what it saved into a module that was made anew, and has no masks. From now on
    `traced.load_state_dict`, and that of modules around it, insert the masks that the state has first, and take masks
    that it has not for ones, so that nothing of the state is left out. Parameters keep their order, which optimizers
    number them by. `Pruning` calls this; without it, as for `LightningModule.load_from_checkpoint`, call it where the
    model is traced. Copies of the module do not do so.

    Args:
        traced: the module, changed in place.

    Returns:
        `traced`.

    Raises:
        ArgumentTypeError: it is no traced module.

    Example:
        >>> traced = masks_from_states(fxprune.trace(model, x))
        >>> traced.load_state_dict(torch.load("masked.pt"))
    """
    require_traced(traced)
    traced.prepare_states(_with_masks)
    return traced


def _with_masks(traced: TracedModule, state: Mapping[str, Any], strict: bool) -> Mapping[str, Any]:
    """Insert the masks of a state; returns the state with ones for those that only the module has.

    Raises:
        StateDictError: it does not fit; nothing was inserted.
    """
    masks = masks_of(traced, state)
    complete = _completed(traced, state)
    expected: dict[str, Any] = traced.state_dict()
    for name, mask in masks.items():
        expected = with_mask(expected, name, mask)
    check_state(complete, expected, strict=strict, is_finalized=traced.plan is not None)
    if masks:
        order = {module: [*module._parameters] for module in traced.modules()}
        driver.insert_masks(traced, masks)
        for module, names in order.items():
            put_in_order(module, [stored for name in names for stored in (name, original_name(name))])
    return complete


def _completed(traced: TracedModule, state: Mapping[str, Any]) -> dict[str, Any]:
    complete = dict(state)
    for path, module in traced.named_modules(remove_duplicate=False):
        for attribute in masked_attributes(module):
            name, mask = join(path, attribute), module.get_buffer(mask_name(attribute))
            # a state of parts of the module says nothing of the others
            if mask_name(name) in state or not any(key.rpartition(".")[0] == path for key in state):
                continue
            complete[mask_name(name)] = torch.ones_like(mask)
            if name in complete:
                complete[original_name(name)] = complete.pop(name)
    return complete
