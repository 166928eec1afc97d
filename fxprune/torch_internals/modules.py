"""Private of torch: modules, optimizers and pruning methods."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod, PruningContainer


def step_pre_hooks(optimizer: object) -> dict[int, Callable[..., Any]] | None:
    """What runs before each step of an optimizer, None where its step runs no hooks."""
    found: dict[int, Callable[..., Any]] | None = getattr(optimizer, "_optimizer_step_pre_hooks", None)
    return found


def is_inside_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the hook that asks runs in a step that another step of the same optimizer makes, by `super().step()`.

    Only the stack tells: a step that raises runs no hook after it, so a flag could not be told from one left behind.
    """
    step = sys._getframe(2)  # torch's wrapper around a step, which runs the hooks
    outer = step.f_back
    while outer is not None:
        if outer.f_code is step.f_code and outer.f_locals.get("self") is optimizer:
            return True
        outer = outer.f_back
    return False


def pruned_tensor(method: BasePruningMethod) -> str:
    """The name of the tensor that a pruning method acts on."""
    return method._tensor_name


def name_pruning_method(method: BasePruningMethod, tensor: str) -> None:
    """Say which tensor a method acts on, as `apply` does, so that it may join a container."""
    method._tensor_name = tensor


def pruning_methods(method: BasePruningMethod) -> tuple[BasePruningMethod, ...]:
    """The methods of a container in order, and the method itself where it is none."""
    return tuple(method._pruning_methods) if isinstance(method, PruningContainer) else (method,)


def flat_weight_names(module: nn.Module) -> list[str]:
    """The names of a recurrent layer's weights in the order of its kernels; none for other modules."""
    return list(getattr(module, "_flat_weights_names", None) or ())


@contextlib.contextmanager
def weights_gathered_if(module: nn.RNNBase, changed: Callable[[], bool]) -> Iterator[None]:
    """Let `changed` say, at each forward, whether a recurrent layer gathers its weights anew."""
    before = vars(module).get("_weights_have_changed")
    vars(module)["_weights_have_changed"] = changed
    try:
        yield
    finally:
        del vars(module)["_weights_have_changed"]
        if before is not None:
            vars(module)["_weights_have_changed"] = before


def has_forward(module: nn.Module) -> bool:
    """Whether the module's class defines a forward."""
    return "_forward_unimplemented" not in getattr(module.forward, "__qualname__", "")


def fuses_in_eval(module: nn.MultiheadAttention) -> bool:
    """Whether the shapes of an attention let eager take its fused kernel in eval mode without gradients."""
    return bool(module.batch_first and module._qkv_same_embed_dim and module.num_heads % 2 == 0)
