"""The parameters and buffers of the network that is to be approached."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.weight_norm import WeightNorm

from fxprune import driver
from fxprune.errors import ArgumentError, ArgumentTypeError
from fxprune.graph.masks import named_by_mask, named_by_original, view
from fxprune.graph.names import exists, locate, tensor_at
from fxprune.graph.traced import TracedModule
from fxprune.prune.repair.changes import Changes


class References:
    """By the names that a graph reads, the tensors of a reference.

    Args:
        traced: the masked module. graph: one of its graphs.
        reference: another module with parameters of the same names; None: the masked one without its masks.
        changes: what is changed in the masked module: the reference has the values from before.

    Attributes:
        is_own: whether it is the masked one without its masks.
    """

    def __init__(self, traced: TracedModule, graph: fx.Graph, reference: nn.Module | None, changes: Changes) -> None:
        self._traced, self._changes = traced, changes
        self._tensors: dict[str, Tensor] = {}
        self.is_own = reference is None
        if reference is None:
            return
        if not isinstance(reference, nn.Module):
            raise ArgumentTypeError(f"reference is a {type(reference).__name__}; a module is needed, or None.")
        targets = dict.fromkeys(str(node.target) for node in graph.find_nodes(op="get_attr"))
        if isinstance(reference, TracedModule):  # weights are plain here where a norm may compute them there
            reference = driver.without_norms(reference, {named_by_original(target) or target for target in targets})
        for target in targets:
            self._add(reference, target)

    def _add(self, reference: nn.Module, target: str) -> None:
        own = tensor_at(self._traced, target)
        masked = named_by_mask(target)
        if masked is not None and exists(self._traced, target) and view(self._traced, masked).mask is not None:
            return
        plain = named_by_original(target)
        if plain is not None and not exists(self._traced, plain) and _holds_masked_values(self._traced, plain):
            found = _value(reference, plain)
        else:
            found = _value(reference, target)
        if found is None and (plain or target) in self._traced.made_biases:
            found = torch.zeros_like(own)
        if found is None:
            if isinstance(own, nn.Parameter):
                raise ArgumentError(
                    f"reference has no parameter {plain or target!r}. Give the model that was traced, or a copy of it "
                    "from before pruning."
                )
            return  # constants of the capture are no part of an eager model
        if found.shape != own.shape:
            raise ArgumentError(
                f"{target!r} has shape {tuple(own.shape)} here and {tuple(found.shape)} in the reference. Give a "
                "module of the same sizes."
            )
        self._tensors[target] = found

    def __call__(self, target: str) -> Tensor:
        """The value of a `get_attr` node."""
        found = self._tensors.get(target)
        own = tensor_at(self._traced, target)
        if found is None:
            return self._changes.before(own)
        return self._changes.before(found).to(own.device, own.dtype)

    def unmasked(self, target: str) -> Tensor:
        """What a `get_attr` node reads in a run without masks, which are ones."""
        masked = named_by_mask(target)
        if masked is not None and (mask := view(self._traced, masked).mask) is not None:
            return torch.ones_like(mask)
        if named_by_original(target) is None and view(self._traced, target).mask is not None:
            return self.value(target)
        return self(target)

    def value(self, name: str) -> Tensor:
        """A parameter of the reference by its name without masks."""
        return self(view(self._traced, name).original_name)

    def restate(self, name: str, values: Tensor) -> None:
        """Give a parameter of another module other values that mean the same; the module stays as it is."""
        self._tensors[view(self._traced, name).original_name] = values

    def differs(self, target: str) -> bool:
        """Whether the two networks have different values there."""
        return target in self._tensors and not torch.equal(self(target), tensor_at(self._traced, target))


def _holds_masked_values(root: nn.Module, name: str) -> bool:
    """Whether a parameter is stored under a mask; what a norm computes is not, though it may store an original, too."""
    found = view(root, name)
    return found.mask is not None and found.original is not None


def _value(module: nn.Module, name: str) -> Tensor | None:
    """A tensor of a module, which may be a masked parameter there."""
    try:
        found = view(module, name)
    except AttributeError:
        return None
    if found.original is not None:
        return found.value()
    owner, attribute = locate(module, name)
    for hook in owner._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == attribute:  # the attribute is from the last forward
            return hook.compute_weight(owner).detach()  # type: ignore[no-any-return]
    value = getattr(owner, attribute, None)
    return value.detach() if isinstance(value, Tensor) else None
