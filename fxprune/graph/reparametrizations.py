"""Reparametrizations that modules carry: which there are, what torch stores for them, and the order of parameters.

torch's spellings: prune hooks keep `weight_orig` and `weight_mask`, legacy norms `weight_g`/`weight_v` and
`weight_orig`/`weight_u`/`weight_v`, parametrizations `parametrizations.weight.original*` beside their own state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fxprune.graph.computed import NORM_SUFFIXES
from fxprune.graph.masks import computed_attributes, forget_mask, mask_name, masked, original_name, view
from fxprune.graph.names import has_parametrization, join, locate
from fxprune.torch_internals import flat_weight_names, pruned_tensor

_aten = torch.ops.aten


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
    return tuple(tensor + suffix for suffix in NORM_SUFFIXES[kind])


def _state_names(owner: nn.Module, tensor: str) -> list[str]:
    """The parameters and buffers of `owner` that reparametrize `tensor` through a mask or a legacy norm."""
    kinds = ["prune"] if view(owner, tensor).mask is not None else []
    kinds += NORM_SUFFIXES if tensor in computed_attributes(owner) else ()
    found = {name for kind in kinds for name in hook_state(kind, tensor)}
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


def remove_state(root: nn.Module, name: str, *, keep_mask: bool = False) -> None:
    """Take away what reparametrizes the parameter `name`; its mask stays on request."""
    owner, tensor = locate(root, name)
    for state in _state_names(owner, tensor):
        if keep_mask and state == mask_name(tensor):
            continue
        owner._parameters.pop(state, None)
        owner._buffers.pop(state, None)
        owner._non_persistent_buffers_set.discard(state)
    forget_mask(owner, tensor)
    if has_parametrization(owner, tensor):
        holder = owner._modules["parametrizations"]
        assert holder is not None
        del holder._modules[tensor]
        if not holder._modules:
            del owner._modules["parametrizations"]


def reparametrized(root: nn.Module) -> list[str]:
    """The qualified names of the parameters that carry a mask, a norm or a parametrization."""
    return list(dict.fromkeys([*masked(root), *computed_names(root)]))


def computed_names(root: nn.Module) -> list[str]:
    """The qualified names of what norms and parametrizations compute, each by the first of its names."""
    return [join(path, tensor) for path, module in root.named_modules() for tensor in computed_attributes(module)]


def computed_from(names: Iterable[str], name: str) -> list[str]:
    """Of the names of parameters those that a norm or a parametrization computes the parameter `name` from.

    Example:
        >>> computed_from(["0.weight_g", "0.weight_v", "0.bias"], "0.weight")
        ['0.weight_g', '0.weight_v']
    """
    prefix, _, tensor = name.rpartition(".")
    inner = join(prefix, f"parametrizations.{tensor}")
    legacy = {stored for kind in NORM_SUFFIXES for stored in hook_state(kind, name)}
    return [n for n in names if n.startswith((f"{inner}.", f"{original_name(inner)}.")) or n in legacy]
