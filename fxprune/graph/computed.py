"""Tensors that torch computes from others at every forward: legacy norms and parametrizations, by what they store."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

from torch import nn

# by the kind of a hook, what follows the name of its tensor in those that it stores
NORM_SUFFIXES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"weight_norm": ("_g", "_v"), "spectral_norm": ("_orig", "_u", "_v")}
)


def parametrized(module: nn.Module) -> list[str]:
    """The tensors of a module that have parametrizations."""
    holder = module._modules.get("parametrizations")
    return [] if holder is None else list(holder._modules)


def legacy_norms(module: nn.Module, held: Collection[str]) -> list[str]:
    """The tensors that a legacy norm's state stands for; what is stored under its own name is none.

    Args:
        module: the module.
        held: its parameters, whatever computes them.
    """
    weight = [name.removesuffix("_g") for name in held if name.endswith("_g")]
    spectral = [name.removesuffix("_u") for name in module._buffers if name.endswith("_u")]
    found = [
        *(tensor for tensor in weight if f"{tensor}_v" in held and f"{tensor}_orig" not in held),
        *(tensor for tensor in spectral if f"{tensor}_orig" in held and f"{tensor}_v" in module._buffers),
    ]
    return [tensor for tensor in dict.fromkeys(found) if tensor not in module._parameters]
