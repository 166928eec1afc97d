"""Why a capture failed, and the advice that fits: of the model itself, of values in forward, of inputs, of sizes."""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxprune.capture.free_axes import FreeAxis, SizeLog
from fxprune.capture.places import place_of_error
from fxprune.capture.protection import attributes_kept, generators_kept
from fxprune.capture.sample import Sample
from fxprune.errors import CaptureError, SampleError
from fxprune.graph.calls import cloned
from fxprune.graph.snapshot import preserved
from fxprune.reports import first_of

_ON_VALUES = (
    "compute what depends on tensor values by tensor operations (torch.where, torch.cond), keep `.item()`, `.numpy()` "
    "and Python branches on values out of forward, or trace the submodules around it. Integers that never change can "
    "be read: hold them in buffers, by register_buffer(..., persistent=False), of a module around the model if need be."
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
_ON_PACKED = (
    "give recurrent layers padded tensors instead of packed sequences, which no graph can hold since their lengths are "
    "values, and mask what lies behind the last step of each."
)
_ON_CONVERSIONS = (
    "convert the module before the capture, as one run of the model does for good: forward then converts nothing."
)
_ON_OTHERS = "trace the submodules around it, or rewrite that line by tensor operations."

# what torch says of values that are not known at the capture: by the name of the error's class, and by its text
_VALUE_CLASSES = ("GuardOnDataDependentSymNode", "DataDependentOutputException", "DynamicOutputShapeException")
_VALUE_TEXTS = ("data-dependent", "data dependent", ".numpy()", ".item()", "_local_scalar_dense", "torch.cond")


def explained(
    error: Exception, model: nn.Module, mode: str, axes: Sequence[FreeAxis] | None, sizes: SizeLog
) -> CaptureError:
    """The error of a capture that failed, with its place and the advice for its cause.

    Args:
        error: what torch, or the model's own code, raised.
        model: what was captured.
        mode: in which mode.
        axes: those that the caller wants free by a structure of dynamic shapes, None without one.
        sizes: what the capture learned of free sizes.
    """
    if axes and "Constraints violated" in str(error):
        return _not_free(error, model, mode, axes, sizes)
    reason = _first_line(error)
    return CaptureError(
        f"{type(model).__name__} was to be captured in {mode} mode and cannot be{_place(error, model)}: "
        f"{type(error).__name__}: {reason} Work around: {_advice(error, axes is not None)}"
    )


def _advice(error: Exception, sizes_given: bool) -> str:
    kind, text = type(error).__name__, str(error)
    if _has_packed(error):
        return _ON_PACKED
    if "Unsupported input type" in text:
        return _ON_INPUTS
    if "in output, which is not a known type" in text:
        return _ON_OUTPUTS
    if "Inference tensors" in text:
        return _ON_INFERENCE
    if "forward converts" in text:
        return _ON_CONVERSIONS
    if asks_for_values(error):
        return _ON_VALUES
    if not sizes_given and kind == "TypeError" and "SymInt" in text:  # of what is fixed only values are unknown
        return _ON_VALUES
    if sizes_given and ("dynamic_shapes" in text or "Constraint" in kind or "constraint" in text):
        return _ON_SIZES
    return _ON_OTHERS


def asks_for_values(error: BaseException | None) -> bool:
    """Whether a capture failed since values of tensors were asked for, which it has not."""
    text = str(error)
    return type(error).__name__ in _VALUE_CLASSES or any(part in text for part in _VALUE_TEXTS)


def _has_packed(error: Exception) -> bool:
    """Whether an error was raised where sequences are packed, or by a recurrent layer over packed ones."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        path = Path(frame.f_code.co_filename).parts[-3:]
        if path == ("nn", "utils", "rnn.py"):
            return True
        if path == ("nn", "modules", "rnn.py") and frame.f_locals.get("batch_sizes") is not None:
            return True
    return False


def _not_free(error: Exception, model: nn.Module, mode: str, axes: Sequence[FreeAxis], sizes: SizeLog) -> CaptureError:
    """The error of a capture whose model does not leave sizes free: which ones, and the lines that fix them."""
    wanted = [axis for axis in axes if not axis.is_auto]
    fixed = {axis: why for axis in wanted if (why := sizes.why_fixed(axis))}
    asked = f"{type(model).__name__} was to be captured in {mode} mode with free sizes and cannot be"
    if fixed:
        told = "; ".join(f"{axis} is fixed {why}" for axis, why in fixed.items())
        cures = dict.fromkeys(map(unfixed, fixed))
        return CaptureError(f"{asked}: {told}. To have it free, {', or '.join(cures)}; to have it fixed, {_LEFT_OUT}.")
    violations, _, suggested = str(error).partition("Suggested fixes:")
    reasons = [_told(line, wanted) for line in violations.splitlines() if line.startswith("  - ")]
    where = sizes.where_conditioned([axis for axis in wanted if axis.dimension in _names_in(violations)] or wanted)
    lines = [line.strip() for line in suggested.strip().split("\n\n")[0].splitlines() if line.strip()]
    told = first_of(reasons, 2) or _first_line(error)
    told += f". Sizes are asked about at {where}" if where else ""
    cure = f"Give the dimensions that torch.export suggests: {'; '.join(lines)}. Or let" if lines else "Let"
    return CaptureError(f"{asked}: {told}. {cure} these lines take any size; to have one fixed, {_LEFT_OUT}.")


_LEFT_OUT = "leave the axis out of `dynamic_shapes`"


def _told(violation: str, axes: Sequence[FreeAxis]) -> str:
    """A condition that torch.export found, in the names that the caller gave."""
    text = violation.strip(" -.")
    for axis in axes:
        name = axis.dimension or str(axis)
        text = text.replace(f"{name} = {axis.source}", name).replace(axis.source, name)
        text = text.replace(f" and {name} <= IntInfinity()", "")
    return re.sub(
        r"Not all values of (.*) in the specified range satisfy the generated guard ",
        r"the model asks of \1 that ",
        text,
    )


def _names_in(violations: str) -> list[str]:
    """The names of dimensions in "Constraints violated (n, m)!"."""
    return violations.partition("(")[2].partition(")!")[0].split(", ")


def unfixed(axis: FreeAxis) -> str:
    """What to do for an axis to be free."""
    if axis.is_constant:
        return "give a sample of size 2 or more there"
    return "let the code there take any size (from the input's own shape, without numbers or tensors of one size)"


def eager_failure(model: nn.Module, sample: Sample, mode: str) -> SampleError | None:
    """The error that says that the model does not run on the sample, None where it does.

    The model runs once, on copies of the inputs, and is left as it was.
    """
    args, kwargs = cloned((sample.args, dict(sample.kwargs)))
    with attributes_kept(model), generators_kept(), preserved(model, parameters=True), torch.enable_grad():
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
    place = place_of_error(error, model)
    return f" at {place}" if place else ""
