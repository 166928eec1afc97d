"""The optimizer's side of training: gradient clipping around its step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fxprune.calling import named_arguments
from fxprune.errors import ArgumentError, ArgumentTypeError, SparseGradientError
from fxprune.torch_internals import is_inside_step, step_pre_hooks


@dataclass(eq=False)
class GradientClipping:
    """The handle that `clip_gradients` returns; as a context manager it removes itself on leaving.

    `total_norm` is a 0-d tensor, detached and on the first gradient's device: the norm over all gradients, unscaled
    and before clipping, of the last step (with a closure: of its last evaluation). It is None before the first step.
    """

    max_norm: float | None
    norm_type: float
    clip_value: float | None
    error_if_nonfinite: bool
    foreach: bool | None
    total_norm: Tensor | None = field(default=None, repr=False)
    _handles: tuple[RemovableHandle, ...] = field(default=(), repr=False)
    _grad_scale: Tensor | None = field(default=None, repr=False)

    def remove(self) -> None:
        """Stop clipping. Calling it again changes nothing."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> GradientClipping:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]] | None:
        """The step pre-hook: clips now or, where the step gets a closure, after each of its evaluations."""
        # a subclass whose step calls super().step() fires the hooks again; torch.compile traces no look at the stack
        if not torch.compiler.is_compiling() and is_inside_step(optimizer):
            return None
        self._grad_scale = None  # a step that raised may have left one
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._clip(optimizer)
            return None

        def clipped() -> Any:
            loss = closure()
            self._clip(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": clipped}
        return (args[0], clipped, *args[2:]), kwargs

    @torch.no_grad()
    def _clip(self, optimizer: Optimizer) -> None:
        if getattr(optimizer, "found_inf", False):  # the fused step that follows leaves the parameters alone
            return
        unique = dict.fromkeys(p for group in optimizer.param_groups for p in group["params"])
        parameters = [p for p in unique if p.grad is not None]
        _refuse_sparse(parameters)
        scale = getattr(optimizer, "grad_scale", None) if parameters else None
        if scale is not None:  # GradScaler leaves unscaling to fused steps
            _unscale(optimizer, scale)
        groups = _by_mesh(parameters)
        try:
            total = self._norm(groups)
        except RuntimeError:
            if scale is not None:
                _scale_again(optimizer, parameters, scale)
            raise
        if scale is not None:
            self._grad_scale, optimizer.grad_scale = scale, None  # type: ignore[attr-defined]
        self.total_norm = total
        for group in groups:
            if self.max_norm is not None:
                clip_grads_with_norm_(group, self.max_norm, total, self.foreach)
            if self.clip_value is not None and group:  # torch fails an internal assert on an empty list
                clip_grad_value_(group, self.clip_value, self.foreach)

    def _norm(self, groups: Sequence[Sequence[Tensor]]) -> Tensor:
        """The norm over all gradients; sharded ones are reduced here, so that reading it later is no collective."""
        found: list[Tensor] = []
        for group in groups:
            norm = get_total_norm([p.grad for p in group], self.norm_type, self.error_if_nonfinite, self.foreach)  # type: ignore[misc]
            found.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        return found[0] if len(found) == 1 else get_total_norm(found, self.norm_type, self.error_if_nonfinite)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._grad_scale is not None:
            self._grad_scale, optimizer.grad_scale = None, self._grad_scale  # type: ignore[attr-defined]


def _by_mesh(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Parameters whose gradients are spread over the same processes together; torch works on no others at once."""
    found: dict[Any, list[Tensor]] = {}
    for p in parameters:
        found.setdefault(p.grad.device_mesh if isinstance(p.grad, DTensor) else None, []).append(p)
    return [*found.values()] or [[]]


def _refuse_sparse(parameters: Iterable[Tensor]) -> None:
    for p in parameters:
        if p.grad is not None and p.grad.layout is not torch.strided:
            raise SparseGradientError(
                f"clip_gradients cannot clip the gradient of a parameter of shape {tuple(p.shape)}: its layout is "
                f"{p.grad.layout}. Build the layer with sparse=False, or give it an optimizer of its own."
            )


def _unscale(optimizer: Optimizer, scale: Tensor) -> None:
    """Unscale all gradients by GradScaler's own arithmetic."""
    scaler = torch.amp.GradScaler(scale.device.type, init_scale=scale.item())
    scaler.scale(torch.ones((), device=scale.device))  # a scaler makes its scale tensor on first use
    scaler.unscale_(optimizer)


def _scale_again(optimizer: Optimizer, parameters: Iterable[Tensor], scale: Tensor) -> None:
    """Leave gradients and optimizer as they were before a step that is refused."""
    for p in parameters:
        if p.grad is not None:
            p.grad.mul_(scale)
    # GradScaler.step, cut short, would multiply the next step's scale by one left behind here.
    if vars(optimizer).pop("found_inf", None) is not None:
        del optimizer.grad_scale  # type: ignore[attr-defined]


@named_arguments
def clip_gradients(
    optimizer: Optimizer,
    *,
    max_norm: float | None = None,
    norm_type: float | str = 2.0,
    clip_value: float | None = None,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> GradientClipping:
    """Clip the gradients of `optimizer` at each of its steps, until the returned handle is removed.

    The arithmetic is torch's own (`torch.nn.utils.clip_grad_norm_` and `clip_grad_value_`) to the bit, over all
    parameters that all groups hold at that step, each counted once; those without a gradient are left out. The order is
    unscale, clip, step: with `torch.amp.GradScaler` just call `scaler.step(optimizer)`, fused optimizers included.
    Where the step gets a closure (LBFGS), gradients are clipped after each evaluation of it. Sharded (DTensor,
    FSDP2) gradients share one norm over all ranks; FSDP1 has no such gradients: use its own `clip_grad_norm_`.

    Args:
        optimizer: any `torch.optim.Optimizer`. Its state dict is unaffected. As with all torch hooks, a deep or pickled
            copy of it is not clipped: call `clip_gradients` on the copy.
        max_norm: the greatest total norm, >= 0; larger gradients are multiplied by `max_norm / (norm + 1e-6)`.
        norm_type: the order of the norm, any float or "inf". For 0 this is torch's value: the number of *tensors* whose
            gradient is not all zero.
        clip_value: the greatest absolute value of an entry, >= 0. With `max_norm` too, it applies after the norm.
        error_if_nonfinite: raise torch's RuntimeError, before any gradient changes, if the norm is NaN or infinite.
        foreach: torch's choice of implementation; the result is the same.

    Returns:
        A handle with `.total_norm` (before clipping) and `.remove()`, also usable as a context manager.

    Raises:
        ArgumentError: no limit given, a limit that is negative or NaN, an optimizer without parameters, or the same
            kind of clipping twice on one optimizer (one by norm and one by value run in the order of registration).
        ArgumentTypeError: an argument of another type, or an optimizer whose step runs no hooks.
        SparseGradientError: at a step, when a gradient is sparse.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(4))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> with clip_gradients(optimizer, max_norm=1.0) as clip:
        ...     (10 * weight).sum().backward()
        ...     optimizer.step()
        >>> clip.total_norm
        tensor(20.)
    """
    hooks = step_pre_hooks(optimizer)
    if not isinstance(optimizer, Optimizer) or hooks is None:
        raise ArgumentTypeError(
            f"clip_gradients needs a torch.optim.Optimizer with step hooks, got {type(optimizer).__name__}. "
            f"{_way_to_an_optimizer(optimizer)}"
        )
    if not any(group["params"] for group in optimizer.param_groups):
        raise ArgumentError(
            f"clip_gradients got a {type(optimizer).__name__} without parameters: its {len(optimizer.param_groups)} "
            "group(s) are empty. Give it parameters first, e.g. with add_param_group."
        )
    if max_norm is None and clip_value is None:
        raise ArgumentError("clip_gradients got no limit: give max_norm, clip_value or both.")
    if not isinstance(error_if_nonfinite, bool) or not isinstance(foreach, bool | None):
        raise ArgumentTypeError(
            "error_if_nonfinite must be True or False and foreach True, False or None, "
            f"got {error_if_nonfinite!r} and {foreach!r}."
        )
    clip = GradientClipping(
        None if max_norm is None else _number("max_norm", max_norm, 0.0),
        _number("norm_type", norm_type, -torch.inf),
        None if clip_value is None else _number("clip_value", clip_value, 0.0),
        error_if_nonfinite,
        foreach,
    )
    for other in hooks.values():
        if isinstance(other, GradientClipping) and any(
            None not in (getattr(clip, kind), getattr(other, kind)) for kind in ("max_norm", "clip_value")
        ):
            raise ArgumentError(
                f"this {type(optimizer).__name__} is already clipped by {other}: remove() that handle first, "
                f"or keep it and drop this call ({clip})."
            )
    clip._handles = optimizer.register_step_pre_hook(clip), optimizer.register_step_post_hook(clip._after_step)
    return clip


def _way_to_an_optimizer(value: object) -> str:
    if isinstance(value, type):
        return f"Pass an instance of {value.__name__}, made of the parameters."
    if isinstance(value, torch.nn.Module | Tensor | Iterator | list | tuple):
        return (
            "It clips at every step of an optimizer: pass the one that holds these parameters. To clip once, call "
            "torch.nn.utils.clip_grad_norm_."
        )
    if isinstance(value, torch.optim.lr_scheduler.LRScheduler):
        return "Pass the scheduler's optimizer."
    if isinstance(value, torch.amp.GradScaler):
        return "Pass the optimizer that it scales for; unscaling happens by itself."
    return "Pass the optimizer itself; of a wrapper, the optimizer inside it."


def _number(name: str, value: object, least: float) -> float:
    accepted = f"{name} must be a number" + (" >= 0 (inf is allowed)" if least == 0 else ' or "inf"')
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
        if isinstance(value, str) and math.isfinite(number):
            raise TypeError
    except TypeError:
        raise ArgumentTypeError(f"{accepted}, got {value!r} of type {type(value).__name__}.") from None
    except (ValueError, OverflowError, RuntimeError):  # the last: a tensor with several elements
        number = torch.nan
    if not number >= least:
        raise ArgumentError(f"{accepted}, got {value!r}.")
    return number
