"""State dicts with masks and norms, loaded into a traced module that has none of them yet."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxprune import driver
from fxprune.calling import named_arguments
from fxprune.errors import StateDictError
from fxprune.graph.masks import mask_name, masked, named_by_mask, original_name
from fxprune.graph.names import join
from fxprune.graph.reparametrizations import computed_names
from fxprune.graph.requirements import require_traced
from fxprune.graph.spellings import respelled
from fxprune.graph.states import check_state
from fxprune.graph.traced import TracedModule
from fxprune.passes import InsertSpectralNorm, InsertWeightNorm
from fxprune.passes.insert_parametrization import InsertParametrization
from fxprune.progress import shown
from fxprune.reports import first_of

State = Mapping[str, Any]


@named_arguments
@shown("load state")
def load_state(traced: TracedModule, state: State, strict: bool = True) -> TracedModule:
    """Load a state dict, and insert the masks and norms that its keys have and the module has not.

    The state may come from a traced module, or from an eager one with `torch.nn.utils.prune`, weight norms or spectral
    norms, in the spelling of hooks (`weight_g`) or of parametrizations. Names say which parameter is masked or normed,
    shapes along which dimension. Norms are inserted as `fxprune.weight_norm` and `spectral_norm` do. Parameters
    stay the same objects, those that become two (a weight norm's) aside.
    How often a spectral norm iterates in train mode, and its eps, are in no state dict: they are torch's defaults.

    Args:
        traced: the module, changed in place.
        state: tensors by name.
        strict: whether the names must be the module's, those of masks and norms added.

    Returns:
        `traced`.

    Raises:
        StateDictError: names or shapes differ, which are named, or a parametrization is none of torch's norms; the
            module is as it was.
        PruningError: a mask or norm cannot be inserted; the module is as it was.
        ArgumentTypeError: `traced` is no traced module, or `state` no mapping.

    Example:
        >>> fxprune.prune.l1_unstructured(traced, "0.weight", amount=0.5)
        >>> torch.save(traced.state_dict(), "masked.pt")
        >>> again = fxprune.trace(model, x)  # without masks
        >>> fxprune.load_state(again, torch.load("masked.pt"))
    """
    require_traced(traced)
    if not isinstance(state, Mapping):
        traced.load_state_dict(state)  # raises
    norms = _norms_of(traced, state)
    normed = traced
    if norms:  # what cannot be inserted shows on a copy
        normed = copy.deepcopy(traced)
        _insert_norms(normed, norms)
    own = normed.state_dict()
    given = respelled(state, own)
    masks = masks_of(normed, given)
    expected = own
    for name, mask in masks.items():
        expected = with_mask(expected, name, mask)
    check_state(given, expected, strict=strict, is_finalized=traced.plan is not None)
    if norms:
        driver.insert_masks(normed, masks)
        _insert_norms(traced, norms)
    driver.insert_masks(traced, masks)
    traced.load_state_dict(given, strict)
    return traced


def _insert_norms(traced: TracedModule, steps: Sequence[InsertParametrization]) -> None:
    with torch.random.fork_rng(devices=[]):  # a spectral norm draws its first vectors, which are then overwritten
        driver.insert_norms(traced, steps)


# ---- masks


def masks_of(traced: TracedModule, given: State) -> dict[str, Tensor]:
    """By parameter, the masks that the keys of a state have and the module has not."""
    names = [name for name, _ in traced.named_parameters(remove_duplicate=False)]
    there = {*names, *computed_names(traced)}.difference(masked(traced))
    own = traced.state_dict()
    plain = {key: named_by_mask(key) for key in given if key not in own}
    return {name: given[key] for key, name in plain.items() if name in there}


def with_mask(own: State, name: str, mask: Tensor) -> dict[str, Any]:
    """The state of a module once a mask is inserted."""
    if name not in own:  # what is computed is stored nowhere
        return {**own, mask_name(name): mask}
    stored = {original_name(name): own[name], mask_name(name): own[name]}
    return {key: value for key, value in own.items() if key != name} | stored


# ---- norms


def _norms_of(traced: TracedModule, state: State) -> list[InsertParametrization]:
    """The norms that the keys of a state have and the module has not."""
    steps: list[InsertParametrization] = []
    unknown: list[str] = []
    for name, parameter in traced.named_parameters():
        if name in state:
            continue
        step = _weight_norm(name, parameter, state) or _spectral_norm(name, parameter, state)
        if step is not None:
            steps.append(step)
        elif any(key.startswith(f"{_inner(name)}.") for key in state):
            unknown.append(name)
    if unknown:
        raise StateDictError(
            f"the state dict has parametrizations of {first_of(unknown, 3)} that are no weight norm or spectral norm "
            "of torch's, and cannot be told from their keys. Build the model with them, and trace that."
        )
    return steps


def _weight_norm(name: str, parameter: Tensor, state: State) -> InsertWeightNorm | None:
    """The weight norm whose magnitude and direction the state has, by the dimension that keeps magnitudes."""
    inner = _inner(name)
    for size, direction in ((f"{name}_g", f"{name}_v"), (f"{inner}.original0", f"{inner}.original1")):
        magnitude = _unmasked(state, size)
        if magnitude is None or _unmasked(state, direction) is None:
            continue
        for dim, length in enumerate(parameter.shape):
            if magnitude.shape == (1,) * dim + (length,) + (1,) * (parameter.dim() - dim - 1):
                return InsertWeightNorm(name, dim)
        return InsertWeightNorm(name, None if magnitude.dim() == 0 else 0)
    return None


def _spectral_norm(name: str, parameter: Tensor, state: State) -> InsertSpectralNorm | None:
    """The spectral norm whose vectors the state has, by the dimension of as many rows."""
    inner = _inner(name)
    for original, rows in ((f"{name}_orig", f"{name}_u"), (f"{inner}.original", f"{inner}.0._u")):
        vector = _unmasked(state, rows)
        if vector is None or _unmasked(state, original) is None:
            continue
        dims = [dim for dim, length in enumerate(parameter.shape) if (length,) == vector.shape]
        return InsertSpectralNorm(name, dim=dims[0] if len(dims) == 1 else None)
    return None


def _unmasked(state: State, name: str) -> Tensor | None:
    value = state.get(name, state.get(original_name(name)))
    return value if isinstance(value, Tensor) else None


def _inner(name: str) -> str:
    """Where a parametrization of a parameter keeps its state."""
    path, _, tensor = name.rpartition(".")
    return join(path, f"parametrizations.{tensor}")
