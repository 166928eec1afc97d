"""A copy of an eager model without the hooks and parametrizations of `torch.nn.utils`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm

from fxprune.graph.reparametrizations import hook_tensor, original_order

_REMOVE: dict[str, Callable[..., Any]] = {
    "prune": prune.remove,
    "weight_norm": remove_weight_norm,
    "spectral_norm": remove_spectral_norm,
}


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode, with the values that reparametrizations have in eval mode; the model stays as it is."""
    copied = deep_copy(model)
    copied.eval()  # a spectral norm's value in train mode would be another
    for module in reversed(list(copied.modules())):  # a mask on the original of a parametrization goes before it
        _make_plain(module)
    return copied


def deep_copy(model: nn.Module) -> nn.Module:
    """A copy of a model, also where hooks computed tensors that torch does not copy."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for leaf in pytree.tree_leaves(vars(module)):
            if isinstance(leaf, Tensor) and not leaf.is_leaf:  # what a hook computed, which torch does not copy
                memo[id(leaf)] = leaf.detach().clone()
    return copy.deepcopy(model, memo)


def _make_plain(module: nn.Module) -> None:
    """Fold what reparametrizes the module; its parameters get the order that they had before."""
    order = original_order(module)
    for hook in reversed(list(module._forward_pre_hooks.values())):
        if (found := hook_tensor(hook)) is not None:
            tensor, kind = found
            _REMOVE[kind](module, tensor)
    if parametrize.is_parametrized(module):
        _remove_parametrizations(module)
    for name in sorted(module._parameters, key=lambda name: order.index(name) if name in order else len(order)):
        module._parameters[name] = module._parameters.pop(name)


def _remove_parametrizations(module: nn.Module) -> None:
    """As torch's function, which would delete the property from the class, though the given model shares it."""
    plain = parametrize.type_before_parametrizations(module)
    holders = module._modules.pop("parametrizations")
    assert isinstance(holders, nn.ModuleDict)
    module.__class__ = plain
    for tensor, holder in holders.items():
        if any(True for _ in holder.parameters(recurse=False)):
            module.register_parameter(tensor, nn.Parameter(holder()))
        else:
            module.register_buffer(tensor, holder())
