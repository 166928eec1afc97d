"""What forward does that torch.export does not record: gradients computed there, tensors' values exchanged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

from fxprune.capture.places import module_names, place_now
from fxprune.errors import CaptureError

_EXCHANGE = torch.ops.aten._has_compatible_shallow_copy_type.default  # all that a graph has of `tensor.data = ...`
_TEXTS = ("fake tensor in the exported program constant's list", "is missing nn_module_stack metadata")
_CURE = {
    "torch.autograd.grad": "have the loop around the model compute gradients, or write them as a formula",
    "Tensor.backward": "have the loop around the model compute gradients",
    "tensor.data = ...": "write into the tensor itself, as in `with torch.no_grad(): tensor.copy_(value)`",
    "self.buffer = another": "write its values: self.buffer = another.clone(), which exchanges two of them, too",
    "tensor.data": "write into the tensor itself within `torch.no_grad()`, and read it by `tensor.detach()`",
}


class _Watch(TorchFunctionMode):
    """Notes which of these steps a forward takes, and where."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names, self.found = module_names(model), dict[str, str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        data: Any = Tensor.data
        steps = {torch.autograd.grad: "torch.autograd.grad", Tensor.backward: "Tensor.backward"}
        steps |= {data.__set__: "tensor.data = ...", data.__get__: "tensor.data"}
        if func in steps:
            self.note(steps[func])
        return func(*args, **(kwargs or {}))

    def note(self, step: str) -> None:
        """Note that this step is taken now."""
        if (place := place_now(self.names)) is not None:
            self.found.setdefault(step, place.quoted)

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Watch assignments, too."""
        assign = nn.Module.__setattr__

        def noted(module: nn.Module, name: str, value: Any) -> None:
            held = [(part, key, own) for part in model.modules() for key, own in part._buffers.items()]
            others = [own for part, key, own in held if part is not module or key != name]
            if name in module._buffers and any(value is other for other in others):
                self.note("self.buffer = another")
            assign(module, name, value)

        nn.Module.__setattr__ = noted  # type: ignore[method-assign, assignment]
        try:
            with self, contextlib.suppress(Exception):  # whatever stops the capture again
                yield
        finally:
            nn.Module.__setattr__ = assign  # type: ignore[method-assign]


def refuse_exchanges(program: ExportedProgram, model: nn.Module, mode: str, export: Callable[[], object]) -> None:
    """Raise CaptureError where forward puts other values in the place of a tensor's by `.data`: none are in the graph.

    Args:
        program: what was captured. model, mode: of what. export: captures once more.
    """
    parts = [part for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    if any(part.graph.find_nodes(op="call_function", target=_EXCHANGE) for part in parts):
        step = "tensor.data = ..."
        raise _refusal(model, mode, [step], export) or _error(model, mode, step, "a place that was not found")


def unrecorded(error: Exception, model: nn.Module, mode: str, export: Callable[[], object]) -> CaptureError | None:
    """The error to raise where a capture failed by such a step, None where it was something else."""
    return _refusal(model, mode, [*_CURE], export) if any(text in str(error) for text in _TEXTS) else None


def _refusal(model: nn.Module, mode: str, steps: list[str], export: Callable[[], object]) -> CaptureError | None:
    watch = _Watch(model)
    with watch.watching(model):
        export()
    step = next((step for step in steps if step in watch.found), None)
    return None if step is None else _error(model, mode, step, watch.found[step])


def _error(model: nn.Module, mode: str, step: str, place: str) -> CaptureError:
    return CaptureError(
        f"{type(model).__name__} was to be captured in {mode} mode and cannot be at {place}: no graph "
        f"records `{step}` in forward. Work around: {_CURE[step]}."
    )
