"""State dicts that bring their masks: what a trainer saved goes into a module that has none of them yet."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fxprune import driver
from fxprune.checkpoints.loading_states import masks_of, with_mask
from fxprune.graph.containers import put_in_order
from fxprune.graph.masks import mask_name, masked_attributes, named_by_original, original_name, view
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
    state = _with_aliases(traced, state)
    masks = masks_of(traced, state)
    complete = _completed(traced, state)
    expected: dict[str, Any] = traced.state_dict()
    for name, mask in masks.items():
        expected = with_mask(expected, name, mask)
    check_state(complete, expected, strict=strict, is_finalized=traced.plan is not None)
    if masks:
        with order_kept(traced):
            driver.insert_masks(traced, masks)
    return complete


@contextlib.contextmanager
def order_kept(traced: TracedModule) -> Iterator[None]:
    """Let parameters that are masked within keep their place, which torch's names would move to the end.

    An optimizer that is made after masks are loaded then numbers parameters as one that was made before, and a norm of
    all gradients is added up in the same order.
    """
    order = {module: [*module._parameters] for module in traced.modules()}
    try:
        yield
    finally:
        for module, names in order.items():
            put_in_order(module, [stored for name in names for stored in (name, original_name(name))])


def _with_aliases(traced: TracedModule, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state with all names of parameters that have several, of which files may store one."""
    complete = dict(state)
    names: dict[int, list[str]] = {}
    for stored, parameter in traced.named_parameters(remove_duplicate=False):
        plain = named_by_original(stored)
        is_masked = plain is not None and view(traced, plain).mask is not None
        names.setdefault(id(parameter), []).append(plain if plain is not None and is_masked else stored)
    for aliases in names.values():
        there = [form for name in aliases for form in (name, original_name(name)) if form in state]
        for name in aliases if there else ():
            if name not in state and original_name(name) not in state:  # each has a mask of its own
                complete[original_name(name) if mask_name(name) in state else name] = state[there[0]]
    return complete


def states_that_share_nothing(traced: TracedModule) -> None:
    """Let state dicts have a copy of each tensor that has another name already, or is not contiguous.

    Files of safetensors hold neither ties nor other memory formats, and the Trainer of transformers writes these.
    """
    traced.register_state_dict_post_hook(_apart)  # type: ignore[no-untyped-call]


def _apart(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    held = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    seen: set[int] = set()
    for key, value in state.items():
        if not key.startswith(prefix) or not isinstance(value, torch.Tensor) or id(value) in held:
            continue  # of another module, or the tensor itself was asked for
        storage = value.untyped_storage().data_ptr()
        if storage in seen or not value.is_contiguous():
            state[key] = value.clone(memory_format=torch.contiguous_format)
        seen.add(storage)


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
