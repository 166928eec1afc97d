"""Reparametrizations that modules carry: which there are, what torch stores for them, and the order of parameters.

torch's spellings: prune hooks keep `weight_orig` and `weight_mask`, legacy norms `weight_g`/`weight_v` and
`weight_orig`/`weight_u`/`weight_v`, parametrizations `parametrizations.weight.original*` beside their own state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fxprune.graph.masks import mask_name, masked, named_by_mask, original_name
from fxprune.graph.names import has_parametrization, join, locate
from fxprune.torch_internals import flat_weight_names, pruned_tensor

_aten = torch.ops.aten
_NORM_SUFFIXES = {"weight_norm": ("_g", "_v"), "spectral_norm": ("_orig", "_u", "_v")}


class Carried(NamedTuple):
    """A reparametrization of an eager model: a path of its module, the name of its tensor, and which of torch's it is.

    `parameter` is the tensor's qualified name by the first path of its module, `owner` that module.
    """

    path: str
    tensor: str
    kind: str
    parameter: str
    owner: nn.Module


def hook_tensor(hook: object) -> tuple[str, str] | None:
    """The tensor name and the kind of a `torch.nn.utils` hook, None for any other hook."""
    if isinstance(hook, BasePruningMethod):
        return pruned_tensor(hook), "prune"
    if isinstance(hook, WeightNorm):
        return hook.name, "weight_norm"
    if isinstance(hook, SpectralNorm):
        return hook.name, "spectral_norm"
    return None


def carried(model: nn.Module) -> Iterator[Carried]:
    """The reparametrizations that `model` carries, under every path of its modules."""
    first: dict[nn.Module, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        front = first.setdefault(module, path)
        for tensor, kind in _reparametrizations(module):
            yield Carried(path, tensor, kind, join(front, tensor), module)


def _reparametrizations(module: nn.Module) -> list[tuple[str, str]]:
    found = [item for hook in module._forward_pre_hooks.values() if (item := hook_tensor(hook))]
    if parametrize.is_parametrized(module):
        found += [(str(tensor), "parametrization") for tensor in module.parametrizations]  # type: ignore[union-attr]
    return found


def hook_state(kind: str, tensor: str) -> tuple[str, ...]:
    """The names of what a hook of `torch.nn.utils` stores to compute `tensor`; `kind` as `hook_tensor` gives it."""
    if kind == "prune":
        return original_name(tensor), mask_name(tensor)
    return tuple(tensor + suffix for suffix in _NORM_SUFFIXES[kind])


def state_names(owner: nn.Module, tensor: str) -> list[str]:
    """The parameters and buffers of `owner` that reparametrize `tensor` through a mask or a legacy norm."""
    found = {name for kind in ("prune", *_NORM_SUFFIXES) for name in hook_state(kind, tensor)}
    return [name for name in (*owner._parameters, *owner._buffers) if name in found]


def original_order(module: nn.Module) -> tuple[str, ...]:
    """The parameter names of `module` in the order it had before any reparametrization.

    torch's hooks and parametrizations move a tensor to the end. Recurrent layers keep the order of construction, others
    show it in the names that their constructors use; failing that, weights stand in front and biases at the end.
    """
    computed = _reparametrizations(module)
    state = {stored for tensor, kind in computed if kind != "parametrization" for stored in hook_state(kind, tensor)}
    missing = [tensor for tensor, _ in computed if tensor not in state]
    names = [name for name in module._parameters if name not in state]
    if flat := flat_weight_names(module):
        return (*flat, *(n for n in names if n not in flat))
    used = construction_order(module)
    if set(used) >= {*names, *missing} and names == sorted(names, key=used.index):
        return tuple(sorted({*names, *missing}, key=used.index))
    front = sorted(set(missing) - set(names), key=lambda n: ("bias" in n, missing.index(n)))
    weights = [n for n in front if "bias" not in n]
    return (*weights, *names, *(n for n in front if "bias" in n))


def construction_order(module: nn.Module) -> list[str]:
    """The names that the constructors of the module's class use, in the order in which they do."""
    codes = (getattr(vars(cls).get("__init__"), "__code__", None) for cls in reversed(type(module).__mro__))
    return [name for code in codes if code for name in code.co_names]


def remove_state(root: nn.Module, name: str) -> None:
    """Take away what reparametrizes the parameter `name`."""
    owner, tensor = locate(root, name)
    for state in state_names(owner, tensor):
        owner._parameters.pop(state, None)
        owner._buffers.pop(state, None)
        owner._non_persistent_buffers_set.discard(state)
    if has_parametrization(owner, tensor):
        holder = owner._modules["parametrizations"]
        assert holder is not None
        del holder._modules[tensor]
        if not holder._modules:
            del owner._modules["parametrizations"]


def reparametrized(root: nn.Module) -> list[str]:
    """The qualified names of the parameters that carry a mask, a norm or a parametrization."""
    found = masked(root)
    for path, module in root.named_modules():
        found += [join(path, tensor) for tensor in (*_legacy_norms(module), *_parametrizations(module))]
    return found


def _legacy_norms(module: nn.Module) -> list[str]:
    """The tensors that a legacy norm's state stands for; any part of the state may be masked."""
    held = {*module._parameters, *(name for stored in module._buffers if (name := named_by_mask(stored)) is not None)}
    weight = [name.removesuffix("_g") for name in held if name.endswith("_g")]
    spectral = [name.removesuffix("_u") for name in module._buffers if name.endswith("_u")]
    return [
        *(tensor for tensor in weight if f"{tensor}_v" in held),
        *(tensor for tensor in spectral if f"{tensor}_orig" in held),
    ]


def _parametrizations(module: nn.Module) -> list[str]:
    holder = module._modules.get("parametrizations")
    return [] if holder is None else list(holder._modules)
