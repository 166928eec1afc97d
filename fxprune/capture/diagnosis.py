"""`diagnose`: where eager torch computes something else than its reparametrizations say, by parameter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fxprune.errors import ArgumentTypeError
from fxprune.graph.reparametrizations import construction_order, hook_state, hook_tensor

_FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass(frozen=True)
class Fault:
    """One fault: its kind, the qualified name of the parameter (or module), what goes wrong, and what to do."""

    kind: str
    parameter: str
    cause: str
    cure: str

    def __str__(self) -> str:
        return f"{self.parameter}: {self.kind}\n    cause: {self.cause}\n    cure:  {self.cure}"


class Faults(tuple[Fault, ...]):
    """The faults of a model, in the order of its modules; prints as text."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no faults found"


def diagnose(model: nn.Module) -> Faults:
    """List where eager torch is inconsistent in `model`, without running or changing it.

    The faults are those of `torch.nn.utils` (pruning, norms, parametrizations) that a module's state shows. A hook that
    never runs is found where torch's own modules read past it; elsewhere `trace` refuses it by name.

    Args:
        model: any eager module.

    Returns:
        A tuple of `Fault` (`kind`, `parameter`, `cause`, `cure`), empty for a sound model. Kinds: "stacked hooks",
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
    holders: dict[nn.Parameter, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(parameter, []).append(f"{path}.{name}" if path else name)
    skipped = {
        child
        for module in model.modules()
        for child in module.children()
        if isinstance(module, nn.MultiheadAttention) or not _runs(child)
    }
    return Faults(
        fault
        for path, module in model.named_modules()
        for fault in _faults(path, module, skipped=module in skipped, holders=holders)
    )


def _runs(module: nn.Module) -> bool:
    return "_forward_unimplemented" not in getattr(module.forward, "__qualname__", "")


def _faults(path: str, module: nn.Module, *, skipped: bool, holders: dict[nn.Parameter, list[str]]) -> Iterator[Fault]:
    prefix = f"{path}." if path else ""
    hooks = {found[0]: hook for hook in module._forward_pre_hooks.values() if (found := hook_tensor(hook))}
    order = list(hooks)
    for tensor, hook in hooks.items():
        name, kind = prefix + tensor, (hook_tensor(hook) or ("", ""))[1]
        state = list(hook_state(kind, tensor))
        for other in order[order.index(tensor) + 1 :]:
            if other in state:
                yield Fault(
                    "stacked hooks",
                    prefix + other,
                    f"the hook that computes {name!r} runs first and reads the {other!r} of the previous forward.",
                    "Reparametrize by torch.nn.utils.parametrizations, or trace the model with one of the two and let "
                    "fxprune insert the other.",
                )
        if skipped:
            yield Fault(
                "hook never runs",
                name,
                f"the weights of this {type(module).__name__} are read by another module, which never calls it: the "
                f"{kind.replace('_', ' ')} is computed once and never again.",
                "Remove it and use a parametrization, or trace the model without it and let fxprune insert it.",
            )
        yield from _tied(name, kind.replace("_", " "), module, prefix, holders, state)
        if _stale(module, tensor, hook):
            yield Fault(
                "stale value",
                name,
                f"the attribute holds what an earlier forward computed; {', '.join(state)} have changed since.",
                "Run a forward before reading it.",
            )
        if isinstance(hook, WeightNorm) and all(
            p.requires_grad == (n in state) for n, p in module._parameters.items() if p is not None
        ):
            yield Fault(
                "unfrozen",
                name,
                f"the legacy weight norm made {' and '.join(state)} trainable, in a module otherwise frozen.",
                "If it is to stay frozen: call requires_grad_(False) on both, or use parametrizations.weight_norm.",
            )
    for buffer in [n for n in module._buffers if n.endswith("_mask") and n[:-5] + "_orig" in module._parameters]:
        if buffer[:-5] not in hooks and not parametrize.is_parametrized(module, buffer[:-5]):
            yield Fault(
                "no hook left",
                prefix + buffer[:-5],
                "a second pruning failed and took the hook of the first with it: the mask no longer acts, and the next "
                "training steps use a stale value.",
                f"Multiply {buffer[:-5]}_orig by {buffer} and register the product as the parameter, or prune again.",
            )
    if parametrize.is_parametrized(module):
        for tensor, listed in module.parametrizations.items():  # type: ignore[union-attr, operator]
            yield from _parametrized(prefix + tensor, listed, holders, f"{prefix}parametrizations.{tensor}.")
    names, used = list(module._parameters), construction_order(module)
    ours = type(module).__module__.startswith("torch.nn.modules") and not hooks and set(names) <= set(used)
    if ours and names != (want := sorted(names, key=used.index)):
        yield Fault(
            "parameter order",
            prefix + names[-1],
            f"prune.remove moved it to the end: the order is {', '.join(names)} instead of {', '.join(want)}. The "
            "state of an optimizer and parameters_to_vector go by this order.",
            "Build the optimizer after removing masks, or load the state dict into a new model.",
        )
    if isinstance(module, _FUSED) and torch.backends.mha.get_fastpath_enabled() and _fused(module):
        yield Fault(
            "fused inference",
            path or type(module).__name__,
            "in eval mode without gradients eager takes a fused kernel, whose rounding is another than that of the "
            "operators; a traced module has the operators in each case.",
            "To compare bit for bit: torch.backends.mha.set_fastpath_enabled(False), or run eager with gradients.",
        )


def _parametrized(name: str, listed: nn.Module, holders: dict[nn.Parameter, list[str]], prefix: str) -> Iterator[Fault]:
    yield from _tied(name, "parametrization", listed, prefix, holders, list(listed._parameters))
    if any(isinstance(step, parametrizations._Orthogonal) for step in listed.children()):
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


def _tied(
    name: str, kind: str, owner: nn.Module, prefix: str, holders: dict[nn.Parameter, list[str]], state: list[str]
) -> Iterator[Fault]:
    held = [(s, p) for s in state if (p := owner._parameters.get(s)) is not None]
    if others := [n for s, p in held for n in holders[p] if n != prefix + s]:
        yield Fault(
            "tied and reparametrized",
            name,
            f"it is tied to {', '.join(others)}, which the {kind} leaves alone: the two compute with different values, "
            "and torch's removal writes one of them into both, so outputs change.",
            "Untie them, or reparametrize both sides; fxprune's removal and finalize split the two.",
        )


def _stale(module: nn.Module, tensor: str, hook: Any) -> bool:
    options = {"do_power_iteration": False} if isinstance(hook, SpectralNorm) else {}
    compute = hook.apply_mask if isinstance(hook, BasePruningMethod) else hook.compute_weight
    try:
        with torch.no_grad():
            value = compute(module, **options).nan_to_num()
    except (AttributeError, RuntimeError, AssertionError):  # state that was tampered with has no value
        return False
    held = getattr(module, tensor, None)
    return not isinstance(held, torch.Tensor) or held.dtype != value.dtype or not torch.equal(held.nan_to_num(), value)


def _fused(module: nn.Module) -> bool:
    attention = module if isinstance(module, nn.MultiheadAttention) else module.self_attn
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    return bool(attention.batch_first and attention._qkv_same_embed_dim and attention.num_heads % 2 == 0 and not hooked)  # type: ignore[union-attr, operator]
