"""Reparametrizations: those a model carries, and the ones inserted, as expressions tagged with the name they stand for.

A node with `meta["fxprune"] = {"pass", "parameter"}` computes the value of that parameter. torch's spellings:
prune hooks keep `weight_orig` and `weight_mask`, legacy norms `weight_g`/`weight_v` and `weight_orig`/`weight_u`/
`weight_v`, parametrizations `parametrizations.weight.original*` beside their own state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fxprune.graph.masks import mask_name, masked, named_by_mask, original_name
from fxprune.graph.mutation import is_mutating
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


def tag_results(graph: fx.Graph, model: nn.Module) -> None:
    """Mark the nodes that compute a tensor the model reparametrizes."""
    items = sorted(carried(model), key=lambda item: item.kind != "parametrization")  # hooks read those too
    for item in items:
        if item.kind == "parametrization":
            paths = [join(i.path, f"parametrizations.{i.tensor}") for i in items if i.parameter == item.parameter]
            results = _parametrization_results(graph, tuple(paths))
        else:
            results = list(_hook_results(graph, item))
        for node in results:
            node.meta["fxprune"] = {"pass": item.kind.replace("_", "-"), "parameter": item.parameter}


def _parametrization_results(graph: fx.Graph, paths: tuple[str, ...]) -> list[fx.Node]:
    below = tuple(path + "." for path in paths)

    def inside(node: fx.Node) -> bool:
        stack = (node.meta.get("nn_module_stack") or {}).values()
        return any(path in paths or path.startswith(below) for path, _ in stack)

    body = [node for node in graph.nodes if inside(node) and not is_mutating(node)]
    # a parametrization that returns what it got leaves no node: the read of the original is the result
    originals = tuple(path + "original" for path in below)
    body = body or [node for node in graph.find_nodes(op="get_attr") if str(node.target).startswith(originals)]
    return [node for node in body if any(not inside(user) and not is_mutating(user) for user in node.users)]


def _hook_results(graph: fx.Graph, item: Carried) -> Iterator[fx.Node]:
    """The nodes that compute what a hook computes: products, `_weight_norm`, quotients of its stored state."""
    state = hook_state(item.kind, item.tensor)

    def reads(operand: object, stored: str) -> bool:
        return _stands_for(operand, item, stored)

    for node in list(graph.nodes):
        if item.kind == "prune" and node.target is _aten.mul.Tensor:
            mask, original = node.args
            if reads(mask, state[1]) and reads(original, state[0]):
                if mask.target is _aten.to.dtype and mask.args[1] == mask.args[0].meta["val"].dtype:
                    # no conversion here; without it the mask follows a later change of the parameter's dtype
                    node.args = (mask.args[0], original)
                yield node
        elif item.kind == "weight_norm" and node.target is _aten._weight_norm.default:
            if reads(node.args[0], state[1]) and reads(node.args[1], state[0]):
                yield node
        elif item.kind == "spectral_norm" and node.target is _aten.div.Tensor and reads(node.args[0], state[0]):
            yield node


def _stands_for(node: object, item: Carried, stored: str) -> bool:
    """Whether a node is the value of the item's state `stored`, as it is or in another shape or dtype."""
    while isinstance(node, fx.Node) and node.target in (_aten.reshape.default, _aten.to.dtype):
        node = node.args[0]
    if not isinstance(node, fx.Node):
        return False
    front = item.parameter.rpartition(".")[0]
    names = {join(item.path, stored), join(front, stored)}
    return not names.isdisjoint((node.target, node.meta.get("fxprune", {}).get("parameter")))


def tagged(graph: fx.Graph, name: str | None = None) -> list[fx.Node]:
    """The nodes that compute the parameter `name`; all such nodes without it."""
    found = [node for node in graph.nodes if "fxprune" in node.meta]
    return [n for n in found if name is None or n.meta["fxprune"]["parameter"] == name]


def tagged_names(graph: fx.Graph) -> set[str]:
    """The parameters that nodes of the graph compute."""
    return {node.meta["fxprune"]["parameter"] for node in tagged(graph)}


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
    weight = [name[:-2] for name in held if name.endswith("_g") and f"{name[:-2]}_v" in held]
    spectral = [name[:-2] for name in module._buffers if name.endswith("_u") and f"{name[:-2]}_orig" in held]
    return weight + spectral


def _parametrizations(module: nn.Module) -> list[str]:
    holder = module._modules.get("parametrizations")
    return [] if holder is None else list(holder._modules)
