"""Models on the device "meta": what stands in for their parameters and buffers while they are captured."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import CaptureError, FxpruneWarning
from fxprune.graph.names import tensors_of
from fxprune.graph.reparametrizations import carried
from fxprune.graph.traced import TracedModule
from fxprune.reports import first_of


def is_hollow(model: nn.Module) -> bool:
    """Whether every parameter is a plain one on "meta": a model to plan with, not one whose loading left some out."""
    parameters = list(model.parameters())
    return bool(parameters) and all(p.device.type == "meta" and type(p) is nn.Parameter for p in parameters)


def is_stood_in(model: nn.Module) -> bool:
    """Whether other tensors stand in for those of a model just now."""
    return any(hasattr(parameter, "stands_for") for parameter in model.parameters())


@contextlib.contextmanager
def stand_ins(model: nn.Module) -> Iterator[Callable[[TracedModule], None]]:
    """Let tensors without values on the CPU stand in for those on "meta".

    A graph captured with these has no "meta" written into it. Their memory is asked for and never written, so that
    the system does not give it.

    Args:
        model: a model with values is left as it is.

    Yields:
        A function that puts the tensors on "meta" into what was captured, and lets it wait for values; called once.

    Raises:
        CaptureError: the model carries masks or norms, or holds other tensors on "meta".

    Warns:
        FxpruneWarning: parameters have no values.
    """
    if not is_hollow(model):
        yield lambda traced: None
        return
    if names := [item.parameter for item in carried(model)]:
        raise CaptureError(
            f"{first_of(names)} of {type(model).__name__} are computed by masks or norms from parameters on the meta "
            "device, without values. Load values first: model.load_state_dict(state, assign=True)."
        )
    known: dict[int, Tensor] = {}
    _replace(model, lambda tensor: _stand_in(tensor, known))
    try:
        yield lambda traced: _hollow(traced, model)
    finally:
        _replace(model, _original)


def _stand_in(tensor: Tensor, known: dict[int, Tensor]) -> Tensor:
    """The stand-in for a tensor, the same one for a tensor that has several names."""
    if tensor.device.type != "meta":
        return tensor
    if id(tensor) not in known:
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        empty.stands_for = tensor  # type: ignore[attr-defined]
        known[id(tensor)] = empty
    return known[id(tensor)]


def _original(tensor: Tensor) -> Tensor:
    original: Tensor = getattr(tensor, "stands_for", tensor)
    return original


def _replace(model: nn.Module, replaced: Callable[[Tensor], Tensor]) -> None:
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for held in tables:
            held.update({name: replaced(tensor) for name, tensor in held.items() if tensor is not None})


def _hollow(traced: TracedModule, model: nn.Module) -> None:
    constants = [name for name, tensor in tensors_of(traced).items() if tensor.device.type == "meta"]
    if constants:
        raise CaptureError(
            f"{first_of(constants)} of {type(model).__name__} are on the meta device, without values, and are no "
            "parameters or buffers, which a state dict could give. Make buffers of them, by register_buffer."
        )
    _replace(traced, _original)
    traced.await_values()
    names = [name for name, tensor in tensors_of(traced).items() if tensor.device.type == "meta"]
    warnings.warn(
        f"{first_of(names)} of {type(model).__name__} have no values: they are on the meta device. Channel groups can "
        "be seen, and nothing could be compared with eager. All else needs traced.load_state_dict(state, assign=True).",
        FxpruneWarning,
        stacklevel=5,
    )
