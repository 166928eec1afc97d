"""Weight norms that a class builds itself: put back onto the weights of a model that was written back, or taken off."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from fxprune.torch_internals import WeightNormParametrization


def restore_weight_norms(written: nn.Module, model: nn.Module) -> None:
    """Give a shrunk model the weight norms of its class, so that a state dict has the keys that the class reads.

    Weights that have slices of zeros stay plain: no norm gives these.

    Args:
        written: the shrunk model, whose weights are plain. model: as its class builds it.
    """
    modules = dict(written.named_modules())
    for path, _, name, steps in _weight_norms(model):
        dim = int(steps[0].dim)  # type: ignore[arg-type]
        if path in modules and torch.norm_except_dim(getattr(modules[path], name), 2, dim).all():
            weight_norm(modules[path], name, dim)
            holder = modules[path].get_submodule(f"parametrizations.{name}")
            for parameter, flags in zip(holder.parameters(), steps.parameters(), strict=True):
                parameter.requires_grad_(flags.requires_grad)


def without_weight_norms(model: nn.Module) -> None:
    """Leave plain weights of those under weight norms."""
    for _, module, name, _ in list(_weight_norms(model)):
        parametrize.remove_parametrizations(module, name)


def _weight_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, parametrize.ParametrizationList]]:
    """Path and module, name of the tensor, and the norm as torch holds it."""
    for path, module in model.named_modules():
        for name, steps in module.parametrizations.items() if parametrize.is_parametrized(module) else ():
            if len(steps) == 1 and isinstance(steps[0], WeightNormParametrization):
                yield path, module, name, steps
