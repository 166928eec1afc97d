"""Layers whose weights a norm or a parametrization computes and a mask multiplies, eager and traced."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fxprune
from fxprune import TracedModule, prune
from fxprune.graph.masks import view
from fxprune.graph.names import locate
from fxprune.graph.values import masked_value
from tests.systems import CARRIED_ONLY, LAYERS, NORMS

Eager = Callable[[nn.Module, str], Any]


class Halved(nn.Module):
    """A parametrization that cannot be assigned through: it has no right_inverse."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class Unchanged(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight


class Counting(nn.Module):
    """Looks at what it gives in every call, as a power iteration does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, weight: Tensor) -> Tensor:
        scaled = weight * 3
        if self.training:
            self.seen.copy_(scaled.abs().amax().detach())
        return scaled


def own(kind: type[nn.Module]) -> Eager:
    return lambda module, name: parametrize.register_parametrization(module, name, kind())


def stacked(module: nn.Module, name: str) -> None:
    parametrizations.weight_norm(module, name)
    parametrizations.spectral_norm(module, name)


SYSTEMS: dict[str, Eager] = {
    **{name: NORMS[name][0] for name in ("weight norm", "weight norm, dim 1", "weight norm, dim -1", "spectral norm")},
    **{
        name: CARRIED_ONLY[name]
        for name in ("legacy weight norm", "legacy weight norm, dim 1", "legacy spectral norm", "orthogonal")
    },
    "without inverse": own(Halved),
    "identity": own(Unchanged),
    "looks at its result": own(Counting),
    "norm under a norm": stacked,
}
INSERTED = {name: NORMS[name][1] for name in ("weight norm", "weight norm, dim 1", "spectral norm")}


class Masked(nn.Module):
    """The eager spelling of a mask on what other parametrizations compute."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return self.mask * weight


def add_mask(module: nn.Module, name: str, mask: Tensor) -> None:
    """Multiply the eager module's weight by a mask, after its norm."""
    if parametrize.is_parametrized(module, name):
        parametrize.register_parametrization(module, name, Masked(mask))
    else:  # a legacy norm's hook runs before this one
        module.register_forward_pre_hook(lambda m, _: setattr(m, name, mask * getattr(m, name)))


def half_of(shape: torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
    """A mask that takes whole rows and single entries."""
    mask = (torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.3).to(dtype)
    mask[::3] = 0
    return mask


def normed(plain: Callable[[], nn.Module], norm: Eager, name: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, on legacy norms
        torch.manual_seed(0)
        model = plain()
        norm(*locate(model, name))
    return model


def twins(
    layer: str, system: str, insert: Callable[[TracedModule, str], Any] | None = None, dtype: torch.dtype | None = None
) -> tuple[TracedModule, nn.Module, tuple[Any, ...], str]:
    """A masked traced module and the eager one, with their inputs and the parameter's name."""
    plain, args, name = LAYERS[layer]
    if dtype is not None:
        build = plain
        plain = lambda: build().to(dtype)  # noqa: E731
        args = tuple(arg.to(dtype) for arg in args)
    eager = normed(plain, SYSTEMS[system], name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, on recurrent weights
        if insert is None:
            traced = fxprune.trace(normed(plain, SYSTEMS[system], name), args, dynamic_shapes=None)
        else:
            torch.manual_seed(0)
            traced = fxprune.trace(plain(), args, dynamic_shapes=None)
            insert(traced.train(), name)
    mask = half_of(view_of(traced, name).shape, next(eager.parameters()).dtype)
    state = {key: value.clone() for key, value in eager.state_dict().items()}
    eager.eval()
    add_mask(*locate(eager, name), mask)
    eager.load_state_dict(state, strict=False)
    traced.load_state_dict(state)
    prune.custom_from_mask(traced, name, mask)
    return traced, eager, args, name


def view_of(traced: TracedModule, name: str) -> Tensor:
    return masked_value(traced, view(traced, name))
