"""Why a capture failed, and the advice that fits: of the model itself, of values in forward, of inputs, of sizes."""

from __future__ import annotations

import traceback
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxprune.capture.protection import attributes_kept, generators_kept
from fxprune.capture.sample import Sample
from fxprune.errors import CaptureError, SampleError
from fxprune.graph.snapshot import preserved

_ON_VALUES = (
    "compute what depends on tensor values by tensor operations (torch.where, torch.cond), keep `.item()`, `.numpy()` "
    "and Python branches on values out of forward, or trace the submodules around it."
)
_ON_INPUTS = (
    "give tensors, numbers and strings in tuples, lists and dicts, or register the class with "
    "torch.export.register_dataclass."
)
_ON_SIZES = (
    "give `dynamic_shapes` in torch.export's structure, one entry for each argument, with sizes that the model leaves "
    'free; "batch" frees axis 0, None fixes all.'
)
_ON_OUTPUTS = "return tensors in tuples, lists and dicts, or register the class with torch.export.register_dataclass."
_ON_INFERENCE = "give inputs and parameters that were made outside torch.inference_mode, as inputs.clone() is."
_ON_OTHERS = "trace the submodules around it, or rewrite that line by tensor operations."

# what torch says of values that are not known at the capture: by the name of the error's class, and by its text
_VALUE_CLASSES = ("GuardOnDataDependentSymNode", "DataDependentOutputException", "DynamicOutputShapeException")
_VALUE_TEXTS = ("data-dependent", "data dependent", ".numpy()", ".item()", "_local_scalar_dense", "torch.cond")


def explained(error: Exception, model: nn.Module, mode: str, *, sizes_given: bool) -> CaptureError:
    """The error of a capture that failed, with its place and the advice for its cause.

    Args:
        error: what torch, or the model's own code, raised.
        model: what was captured.
        mode: in which mode.
        sizes_given: whether the caller gave a structure of dynamic shapes.
    """
    reason = _first_line(error)
    return CaptureError(
        f"{type(model).__name__} was to be captured in {mode} mode and cannot be{_place(error, model)}: "
        f"{type(error).__name__}: {reason} Work around: {_advice(error, sizes_given)}"
    )


def _advice(error: Exception, sizes_given: bool) -> str:
    kind, text = type(error).__name__, str(error)
    if "Unsupported input type" in text:
        return _ON_INPUTS
    if "in output, which is not a known type" in text:
        return _ON_OUTPUTS
    if "Inference tensors" in text:
        return _ON_INFERENCE
    if kind in _VALUE_CLASSES or any(part in text for part in _VALUE_TEXTS):
        return _ON_VALUES
    if sizes_given and ("dynamic_shapes" in text or "Constraint" in kind or "constraint" in text):
        return _ON_SIZES
    return _ON_OTHERS


def eager_failure(model: nn.Module, sample: Sample, mode: str) -> SampleError | None:
    """The error that says that the model does not run on the sample, None where it does.

    The model runs once, on copies of the inputs, and is left as it was.
    """
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (sample.args, dict(sample.kwargs)))
    with attributes_kept(model), generators_kept(), preserved(model), torch.enable_grad():
        try:
            model.train(mode == "train")
            model(*args, **kwargs)
        except Exception as error:  # whatever the model's own code raises
            reason = _first_line(error)
            cure = "Give inputs that `model(...)` itself runs on."
            if isinstance(error, NotImplementedError) and type(model).forward is nn.Module.forward:
                cure = "It has no forward: give a module that calls its parts, such as nn.Sequential."
            failure = SampleError(
                f"{type(model).__name__} does not run on these inputs in {mode} mode{_place(error, model)}: "
                f"{type(error).__name__}: {reason} Given were "
                f"{_described(sample)}. {cure}"
            )
            failure.__cause__ = error
            return failure
    return None


def _first_line(error: Exception) -> str:
    """What an error says in its first line, as a sentence."""
    line = str(error).strip().split("\n")[0] or "it says nothing more"
    return line if line.endswith(".") else f"{line}."


def _described(sample: Sample) -> str:
    def described(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        return f"{value!r:.40}"

    inputs = [described(leaf) for leaf in pytree.tree_leaves((sample.args, dict(sample.kwargs)))]
    return ", ".join(inputs) or "none"


def _place(error: Exception, model: nn.Module) -> str:
    """The innermost module of the model, and its line, that the error passed through; '' where it is not known."""
    names = {id(module): name for name, module in model.named_modules()}
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        called = frame.f_code.co_name
        if id(owner) in names and called != "_call_impl" and not called.startswith("_wrapped"):
            name = names[id(owner)] or "the root module"
            place = f" at {name} ({type(owner).__name__}), {frame.f_code.co_filename}:{line}"
    return place
