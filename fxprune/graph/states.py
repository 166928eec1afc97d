"""State dicts that do not fit a traced module: what differs, and what to do by the cause of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fxprune.errors import ArgumentTypeError, StateDictError
from fxprune.graph.masks import named_by_mask
from fxprune.reports import first_of

_EXTRA = "_extra_state"  # how torch calls what a module's `get_extra_state` gives
_PREFIXES = {"module.": "nn.DataParallel", "_orig_mod.": "torch.compile"}


def check_state(given: object, own: Mapping[str, Any], *, strict: bool, is_finalized: bool) -> None:
    """Raise unless a state dict fits a module.

    Args:
        given: what is to be loaded.
        own: the state of the module.
        strict: whether both must have the same names.
        is_finalized: whether channels of the module were removed.

    Raises:
        ArgumentTypeError: it is no mapping. StateDictError: names or shapes differ.
    """
    if not isinstance(given, Mapping):
        raise ArgumentTypeError(
            f"load_state_dict takes a mapping of tensors by name, got {type(given).__name__}. A file is read before: "
            "torch.load(path, weights_only=True); files of fxprune.save are read by fxprune.load."
        )
    missing = [name for name in own if name not in given] if strict else []
    unexpected = [name for name in given if name not in own] if strict else []
    sizes = [name for name, value in given.items() if name in own and not _fits(value, own[name])]
    if not (missing or unexpected or sizes):
        return
    told = [f"Missing key(s): {first_of(missing, 3)}"] if missing else []
    told += [f"Unexpected key(s): {first_of(unexpected, 3)}"] if unexpected else []
    if sizes:
        pairs = [f"{name} {_shape(given[name])} for {_shape(own[name])}" for name in sizes]
        told.append(f"size mismatch: {first_of(pairs, 3)}")
    cure = _cure(given, missing, unexpected, sizes, is_finalized)
    raise StateDictError(f"the state dict does not fit the traced module: {'; '.join(told)}. {cure}")


def _fits(value: object, own: object) -> bool:
    """As torch has it: what is no tensor is loaded by other means, and a number may stand in a list of one."""
    if not isinstance(value, Tensor) or not isinstance(own, Tensor):
        return True
    return value.shape == own.shape or (own.dim() == 0 and tuple(value.shape) == (1,))


def _shape(value: Tensor) -> str:
    return str(list(value.shape))


def _cure(
    given: Mapping[str, Any],
    missing: Sequence[str],
    unexpected: Sequence[str],
    sizes: Sequence[str],
    is_finalized: bool,
) -> str:
    inner = [key for key, value in given.items() if isinstance(value, Mapping) and value.keys() & set(missing)]
    if inner:
        return f"It is a whole checkpoint: load its entry {inner[0]!r}."
    for prefix, source in _PREFIXES.items():
        if unexpected and all(name.startswith(prefix) for name in unexpected):
            return (
                f"It is the state of a module within {source}: take {prefix!r} off the names, "
                f"{{name.removeprefix({prefix!r}): value for name, value in state.items()}}."
            )
    if unexpected and all(name.rpartition(".")[2] == _EXTRA for name in unexpected):
        return (
            "That is what modules keep beside their tensors (get_extra_state), which no graph reads: they go on with "
            "what it was when the model was traced. Where it is the same, leave it out: {name: value for name, value "
            f"in state.items() if not name.endswith({_EXTRA!r})}}; else load it into the eager model, and trace that."
        )
    if masks := [plain for name in unexpected if (plain := named_by_mask(name))]:
        return (
            f"It has masks that the module has not: {first_of(masks)}. fxprune.load_state(traced, state) inserts them; "
            "fxprune.save and fxprune.load keep them, too."
        )
    if any(re.search(r"\.parametrizations\.|^parametrizations\.|_[guv]$", name) for name in unexpected):
        return "It has norms that the module has not. fxprune.load_state(traced, state) inserts them."
    if masks := [plain for name in missing if (plain := named_by_mask(name))]:
        return f"It has no masks, and the module has some: {first_of(masks)}. Load it before pruning."
    if sizes and is_finalized:
        return "Channels of the module were removed by fxprune.finalize: load the state of the dense model before that."
    return "Give the state of the model as it was traced."
