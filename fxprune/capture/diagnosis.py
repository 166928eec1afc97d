"""`diagnose`: where eager torch computes something else than its reparametrizations say, by parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fxprune.errors import ArgumentTypeError
from fxprune.graph.masks import mask_name, named_by_mask, original_name
from fxprune.graph.names import join
from fxprune.graph.reparametrizations import construction_order, hook_state, hook_tensor
from fxprune.reports import Readable, counted, first_of
from fxprune.torch_internals import Orthogonal, fuses_in_eval, has_forward


@dataclass(frozen=True, repr=False)
class Fault(Readable):
    """One fault: its kind, the qualified name of the parameter (or module), what goes wrong, and what to do."""

    kind: str
    parameter: str
    cause: str
    cure: str

    def __str__(self) -> str:
        return f"{self.parameter}: {self.kind}\n    cause: {self.cause}\n    cure:  {self.cure}"

    def table(self) -> str:
        """The same as `str`."""
        return str(self)

    def to_dict(self) -> dict[str, str]:
        """The four texts by name."""
        return asdict(self)


class Faults(Readable, tuple[Fault, ...]):
    """The faults of a model, in the order of its modules; prints the first of them, `table()` has all."""

    def __str__(self) -> str:
        shown = [*map(str, self[:_SHOWN])]
        if (more := len(self) - _SHOWN) > 0:
            shown.append(f"and {counted(more, 'fault')} more: table() has all")
        return "\n".join(shown) or "no faults found"

    def __repr__(self) -> str:
        return f"<Faults: {first_of(f'{fault.parameter}: {fault.kind}' for fault in self) or 'none'}>"

    def table(self) -> str:
        """Every fault with its cause and its cure."""
        return "\n".join(map(str, self)) or "no faults found"

    def to_dict(self) -> dict[str, Any]:
        """The faults in order."""
        return {"count": len(self), "faults": [fault.to_dict() for fault in self]}


_SHOWN = 3  # of the faults of a model, where they are printed


def diagnose(model: nn.Module) -> Faults:
    """List where eager torch is inconsistent in `model`, without running or changing it.

    The faults are those of `torch.nn.utils` (pruning, norms, parametrizations) that a module's state shows. A hook that
    never runs is found where torch's own modules read past it; elsewhere `trace` refuses it by name.

    Args:
        model: any eager module.

    Returns:
        A tuple of `Fault` (`kind`, `parameter`, `cause`, `cure`), empty for a sound model; it prints as text, and has
        `table()` and `to_dict()`. Kinds: "stacked hooks",
        "hook never runs", "tied and reparametrized", "no hook left", "stale value", "unfrozen", "half precision",
        "parameter order", "fused inference".

    Raises:
        ArgumentTypeError: `model` is no module.

    Example:
        >>> print(fxprune.diagnose(nn.Linear(4, 2)))
        no faults found
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"diagnose takes an nn.Module, got {type(model).__name__}.")
    return Faults(fault for place in _places(model) for fault in _faults(place))


@dataclass(frozen=True, eq=False)
class _Hook:
    """A hook of `torch.nn.utils`: the tensor it computes, its kind in words, and the names of what it computes from."""

    tensor: str
    kind: str
    state: tuple[str, ...]
    hook: Any


@dataclass(frozen=True, eq=False)
class _Place:
    """A module where it stands first.

    Attributes:
        path: its path. module: itself.
        hooks: the hooks that compute its tensors, in the order in which they run.
        is_bypassed: whether another module reads its parameters and never calls it.
        holders: of every parameter of the model, all its names.
    """

    path: str
    module: nn.Module
    hooks: tuple[_Hook, ...]
    is_bypassed: bool
    holders: Mapping[nn.Parameter, list[str]]

    def name(self, attribute: str) -> str:
        return join(self.path, attribute)


def _places(model: nn.Module) -> Iterator[_Place]:
    holders: dict[nn.Parameter, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(parameter, []).append(join(path, name))
    bypassed = {
        child
        for module in model.modules()
        for child in module.children()
        if isinstance(module, nn.MultiheadAttention) or not has_forward(child)
    }
    for path, module in model.named_modules():
        yield _Place(path, module, _hooks(module), module in bypassed, holders)


def _hooks(module: nn.Module) -> tuple[_Hook, ...]:
    found: dict[str, _Hook] = {}
    for hook in module._forward_pre_hooks.values():
        if named := hook_tensor(hook):
            tensor, kind = named
            found[tensor] = _Hook(tensor, kind.replace("_", " "), hook_state(kind, tensor), hook)
    return tuple(found.values())


def _faults(place: _Place) -> Iterator[Fault]:
    for hook in place.hooks:
        for find in _OF_HOOKS:
            yield from find(place, hook)
    for find_here in _OF_MODULES:
        yield from find_here(place)


# ---- faults of a hook


def _stacked(place: _Place, hook: _Hook) -> Iterator[Fault]:
    later = place.hooks[place.hooks.index(hook) + 1 :]
    for other in (other.tensor for other in later if other.tensor in hook.state):
        yield Fault(
            "stacked hooks",
            place.name(other),
            f"the hook that computes {place.name(hook.tensor)!r} runs first and reads the {other!r} of the previous "
            "forward.",
            "Reparametrize by torch.nn.utils.parametrizations, or trace the model with one of the two and let "
            "fxprune insert the other.",
        )


def _never_runs(place: _Place, hook: _Hook) -> Iterator[Fault]:
    if place.is_bypassed:
        yield Fault(
            "hook never runs",
            place.name(hook.tensor),
            f"the weights of this {type(place.module).__name__} are read by another module, which never calls it: the "
            f"{hook.kind} is computed once and never again.",
            "Remove it and use a parametrization, or trace the model without it and let fxprune insert it.",
        )


def _tied_hook(place: _Place, hook: _Hook) -> Iterator[Fault]:
    own = {place.name(name): place.module._parameters.get(name) for name in hook.state}
    yield from _tied(place.name(hook.tensor), hook.kind, own, place.holders)


def _tied(
    name: str, kind: str, own: Mapping[str, nn.Parameter | None], holders: Mapping[nn.Parameter, list[str]]
) -> Iterator[Fault]:
    """`own`: by name, the parameters that `name` is computed from."""
    held = [(known, parameter) for known, parameter in own.items() if parameter is not None]
    if others := [other for known, parameter in held for other in holders[parameter] if other != known]:
        yield Fault(
            "tied and reparametrized",
            name,
            f"it is tied to {', '.join(others)}, which the {kind} leaves alone: the two compute with different values, "
            "and torch's removal writes one of them into both, so outputs change.",
            "Untie them, or reparametrize both sides; fxprune's removal and finalize split the two.",
        )


def _stale(place: _Place, hook: _Hook) -> Iterator[Fault]:
    if _holds_another_value(place.module, hook):
        yield Fault(
            "stale value",
            place.name(hook.tensor),
            f"the attribute holds what an earlier forward computed; {', '.join(hook.state)} have changed since.",
            "Run a forward before reading it.",
        )


def _holds_another_value(module: nn.Module, hook: _Hook) -> bool:
    computes = hook.hook
    try:
        with torch.no_grad():
            if isinstance(computes, BasePruningMethod):
                value = computes.apply_mask(module)
            elif isinstance(computes, SpectralNorm):
                value = computes.compute_weight(module, do_power_iteration=False)
            else:
                value = computes.compute_weight(module)
            value = value.nan_to_num()
    except (AttributeError, RuntimeError, AssertionError):  # state that was tampered with has no value
        return False
    held = getattr(module, hook.tensor, None)
    return not isinstance(held, torch.Tensor) or held.dtype != value.dtype or not torch.equal(held.nan_to_num(), value)


def _unfrozen(place: _Place, hook: _Hook) -> Iterator[Fault]:
    parameters = place.module._parameters.items()
    trained = {name for name, parameter in parameters if parameter is not None and parameter.requires_grad}
    present = {name for name, parameter in parameters if parameter is not None}
    if isinstance(hook.hook, WeightNorm) and trained == present & set(hook.state):
        yield Fault(
            "unfrozen",
            place.name(hook.tensor),
            f"the legacy weight norm made {' and '.join(hook.state)} trainable, in a module otherwise frozen.",
            "If it is to stay frozen: call requires_grad_(False) on both, or use parametrizations.weight_norm.",
        )


# ---- faults of a module


def _orphaned_masks(place: _Place) -> Iterator[Fault]:
    module, hooked = place.module, {hook.tensor for hook in place.hooks}
    for tensor in (named_by_mask(stored) for stored in module._buffers):
        if tensor is None or original_name(tensor) not in module._parameters:
            continue
        if tensor not in hooked and not parametrize.is_parametrized(module, tensor):
            yield Fault(
                "no hook left",
                place.name(tensor),
                "a second pruning failed and took the hook of the first with it: the mask no longer acts, and the next "
                "training steps use a stale value.",
                f"Multiply {original_name(tensor)} by {mask_name(tensor)} and register the product as the parameter, "
                "or prune again.",
            )


def _parametrized(place: _Place) -> Iterator[Fault]:
    if not parametrize.is_parametrized(place.module):
        return
    for tensor, listed in place.module.parametrizations.items():  # type: ignore[union-attr, operator]
        path = place.name(f"parametrizations.{tensor}")
        own = {join(path, name): parameter for name, parameter in listed._parameters.items()}
        yield from _tied(place.name(tensor), "parametrization", own, place.holders)
        yield from _half_precision(place.name(tensor), listed)


def _half_precision(name: str, listed: nn.Module) -> Iterator[Fault]:
    if not any(isinstance(step, Orthogonal) for step in listed.children()):
        return
    try:
        with torch.no_grad():
            listed()
    except (TypeError, RuntimeError) as error:
        dtype = next(listed.parameters()).dtype
        yield Fault(
            "half precision",
            name,
            f"torch's orthogonal parametrization raises in {dtype}: {error}.",
            "Keep this parameter in float32, or take another orthogonal_map.",
        )


def _parameter_order(place: _Place) -> Iterator[Fault]:
    module = place.module
    names, used = list(module._parameters), construction_order(module)
    if place.hooks or not type(module).__module__.startswith("torch.nn.modules") or not set(names) <= set(used):
        return
    built = sorted(names, key=used.index)
    if names != built:
        yield Fault(
            "parameter order",
            place.name(names[-1]),
            f"prune.remove moved it to the end: the order is {', '.join(names)} instead of {', '.join(built)}. The "
            "state of an optimizer and parameters_to_vector go by this order.",
            "Build the optimizer after removing masks, or load the state dict into a new model.",
        )


def _fused_inference(place: _Place) -> Iterator[Fault]:
    module = place.module
    attention = module.self_attn if isinstance(module, nn.TransformerEncoderLayer) else module
    if not isinstance(attention, nn.MultiheadAttention) or not torch.backends.mha.get_fastpath_enabled():
        return
    is_hooked = any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    if fuses_in_eval(attention) and not is_hooked:
        yield Fault(
            "fused inference",
            place.path or type(module).__name__,
            "in eval mode without gradients eager takes a fused kernel, whose rounding is another than that of the "
            "operators; a traced module has the operators in each case.",
            "To compare bit for bit: torch.backends.mha.set_fastpath_enabled(False), or run eager with gradients.",
        )


_OF_HOOKS: tuple[Callable[[_Place, _Hook], Iterator[Fault]], ...] = (
    _stacked, _never_runs, _tied_hook, _stale, _unfrozen,
)  # fmt: skip
_OF_MODULES: tuple[Callable[[_Place], Iterator[Fault]], ...] = (
    _orphaned_masks, _parametrized, _parameter_order, _fused_inference,
)  # fmt: skip
