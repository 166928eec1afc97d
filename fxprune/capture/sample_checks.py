"""What `trace` refuses before it captures: things that are no model, and sample inputs that no model takes."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset

from fxprune.capture.stand_ins import is_hollow
from fxprune.errors import CaptureError, SampleError
from fxprune.graph.calls import Call, as_call
from fxprune.graph.names import tensors_of
from fxprune.reports import first_of

_QUANTIZED = ("torch.ao.nn.quantized", "torch.nn.quantized", "bitsandbytes.")  # where layers of such weights come from


def check_model(model: object, args: object) -> None:
    """Raise CaptureError unless the value is an eager module; the message has the way to one."""
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"trace was given TorchScript ({model.original_name}), which torch.export cannot read. Trace the eager "
            "module that was scripted."
        )
    if not isinstance(model, nn.Module):
        raise CaptureError(f"trace takes an nn.Module, got {type(model).__name__}. {_way_to_a_module(model, args)}")
    _check_contents(model)


def _check_contents(model: nn.Module) -> None:
    """Raise CaptureError where the tensors of a model are not there."""
    kind = type(model).__name__
    if "_modules" not in vars(model):
        raise CaptureError(f"the model has no parts: {kind}.__init__ does not call super().__init__(). Call it first.")
    tensors = tensors_of(model)
    if lazy := [name for name, tensor in tensors.items() if is_lazy(tensor)]:
        raise CaptureError(
            f"{first_of(lazy)} of {kind} have no shape yet, since lazy layers take it from their first inputs. Run the "
            "model once before: model(inputs)."
        )
    absent = [name for name, tensor in tensors.items() if tensor.device.type == "meta"]
    is_offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())  # by the accelerate library
    if absent and (is_offloaded or not is_hollow(model)):
        cure = "model.load_state_dict(state, assign=True)."
        if is_offloaded:
            cure = "they are offloaded, so load it with device_map=None, or with device_map='cpu'."
        raise CaptureError(
            f"{first_of(absent)} of {kind} are on the meta device, without values. Give the model some: {cure}"
        )
    quantized = [path for path, module in model.named_modules() if type(module).__module__.startswith(_QUANTIZED)]
    quantized += [name for name, tensor in tensors.items() if tensor.is_quantized]
    if quantized or getattr(model, "is_quantized", False) is True:
        where = f"{first_of(quantized)} of {kind}" if quantized else kind
        raise CaptureError(
            f"{where} has quantized weights, whose channels cannot be cut. Load or build the model without "
            "quantization (quantization_config=None), prune that, and quantize what comes back."
        )


def _way_to_a_module(model: object, args: object) -> str:
    if any(isinstance(leaf, nn.Module) for leaf in (args if isinstance(args, tuple | list) else [args])):
        return "The arguments are swapped: fxprune.trace(model, inputs)."
    if isinstance(getattr(model, "__self__", None), nn.Module):
        return "Give the module itself; a method such as eval is called before."
    if isinstance(model, type) and issubclass(model, nn.Module):
        return f"Give an instance of the class: fxprune.trace({model.__name__}(...), inputs)."
    if isinstance(model, str | os.PathLike):
        return "Build the model and load its weights first; fxprune.load reads files of fxprune.save and .pt2 programs."
    if isinstance(model, Mapping):
        return "Build the model and give it these with load_state_dict, then trace it."
    if isinstance(model, list | tuple) and model and all(isinstance(part, nn.Module) for part in model):
        return "Put the layers into nn.Sequential, or into a module whose forward calls them."
    if isinstance(model, ExportedProgram):
        return "Store the program by torch.export.save(program, 'model.pt2'), and give that to fxprune.load."
    if callable(model):
        return "Wrap the function in a module."
    return "Give the model itself."


def checked_sample(model: nn.Module, args: object, kwargs: object) -> Call:
    """The sample inputs as a call of the model's forward; raises SampleError where they are none.

    Args:
        model: the module.
        args: what `trace` was given as inputs; a list stands for a tuple.
        kwargs: what it was given as keyword inputs.
    """
    if isinstance(args, nn.Module):
        raise SampleError(f"trace was given two modules; inputs are needed: {_example(model)}.")
    if not isinstance(args, tuple | list | Mapping | Tensor):
        raise SampleError(_no_input(args, "args"))
    if isinstance(kwargs, Tensor):
        raise SampleError(
            "kwargs is a Tensor; it takes inputs by name. Several by position stand in a tuple; labels are no input."
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise SampleError(
            f"kwargs is a {type(kwargs).__name__}; it takes inputs by name: fxprune.trace(model, (), {{...}})."
        )
    call = as_call(tuple(args) if isinstance(args, list) else args, kwargs, error=SampleError)
    if any(isinstance(value, PackedSequence) for value in (*call.args, *call.kwargs.values())):
        raise SampleError(
            "an input is a packed sequence, which no graph can hold since its lengths are values. Give padded tensors, "
            "and mask what lies behind the last step of each."
        )
    for leaf in pytree.tree_leaves(tuple(call)):
        if isinstance(leaf, np.ndarray | np.generic | DataLoader | Dataset | Iterator):
            raise SampleError(_no_input(leaf, "an input"))
        if isinstance(leaf, Tensor) and leaf.device.type == "meta":
            where = "the CPU" if is_hollow(model) else "the device of the model"
            raise SampleError(
                f"an input of shape {tuple(leaf.shape)} is on the meta device. Give it values, on {where}: what "
                "is made of the model later is compared with it on them."
            )
    _check_signature(model, *call)
    return call


def check_batch(call: Call) -> None:
    """Raise SampleError where the axis that is to be free, the first of the first tensor, is empty."""
    sized = (leaf for leaf in pytree.tree_leaves(tuple(call)) if isinstance(leaf, Tensor) and leaf.dim())
    first = next(sized, None)
    if first is not None and not len(first):
        raise SampleError(f"the sample is an empty batch, of shape {tuple(first.shape)}. Give a batch of one or more.")


def _no_input(value: object, what: str) -> str:
    kind = type(value).__name__
    if isinstance(value, np.ndarray | np.generic):
        return f"{what} is a numpy {kind}; tensors are needed: torch.from_numpy(array), in the dtype of the model."
    if isinstance(value, DataLoader | Dataset | Iterator):
        return (
            f"{what} is a {kind}; trace takes the inputs of one call. Take one batch of it, without its labels: "
            "inputs, labels = next(iter(loader)); fxprune.trace(model, (inputs,))."
        )
    return (
        f"{what} is a {kind}; trace takes a tensor, a tuple of positional inputs, or a dict of inputs by name: "
        "fxprune.trace(model, (inputs,))."
    )


def _check_signature(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise SampleError(_misfit(model, signature, args, kwargs, error)) from None


def _misfit(
    model: nn.Module, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any], error: TypeError
) -> str:
    taken = f"{type(model).__name__}.forward takes {signature}"
    if not args and not kwargs:
        return f"no inputs were given; {taken}. Give a sample of each: {_example(model)}."
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    room = sum(parameter.kind in kinds for parameter in signature.parameters.values())
    if len(args) <= room:
        named = [*([f"{len(args)} by position"] if args else []), *map(str, kwargs)]
        return (
            f"the sample inputs do not fit: {error}; {taken}, and was given {', '.join(named)}. Give the inputs that "
            "it needs, by these names."
        )
    given = f"{len(args)} inputs were given by position; {taken}"
    if all(isinstance(arg, int) for arg in args):
        return f"{given}. For a shape, give a tensor of it: fxprune.trace(model, (torch.randn{args},))."
    if len(args) == room + 1 and isinstance(args[0], Tensor):
        return f"{given}. Labels are no input: for a batch (inputs, labels), {_example(model)}."
    return f"{given}. Give one call's inputs in a tuple: {_example(model)}."


def _example(model: nn.Module) -> str:
    """How the model is traced, with the names of what it must be given."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty] or ["inputs"]
    return f"fxprune.trace(model, ({', '.join(names)}{',' if len(names) == 1 else ''}))"
