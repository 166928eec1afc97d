"""What can be compared: modules, programs of torch and ONNX files, each run on a call and giving tensors by name."""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from fxprune.capture.archives import read_program
from fxprune.capture.caches import without_foreign_caches
from fxprune.errors import CompareError, FxpruneError
from fxprune.files import check_suffix
from fxprune.graph.calls import Call, cloned
from fxprune.graph.snapshot import preserved

from .session import Session
from .values import as_captured, dtype_name, match_inputs, output_tensors

PROGRAM_SUFFIXES = (".pt2", ".pt")


class TorchRunner(ABC):
    """Something that torch runs: the outputs of a call by name, on the CPU, with gradients recorded.

    Attributes:
        name: in reports. rtol: a tolerance of its own, None: that of each output's dtype.
    """

    name: str
    rtol: float | None = None

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The outputs of one call by path.

        Raises:
            CompareError: it cannot run these inputs, or returns what cannot be compared.
        """
        args, kwargs = cloned((args, kwargs))
        with torch.enable_grad():
            try:
                outputs = output_tensors(self._call(args, kwargs), self.name)
            except FxpruneError:
                raise
            except Exception as error:  # whatever the model's own code raises
                plain = without_foreign_caches((args, kwargs))  # which hold tensors alone
                given = pytree.tree_map_only(torch.Tensor, lambda t: f"{dtype_name(t)}{list(t.shape)}", plain)
                many = isinstance(error, TypeError) and "positional argument" in str(error)
                cure = " Labels are no input: give what the model is called with." if many else ""
                raise CompareError(
                    f"{self.name} cannot run these inputs: {type(error).__name__}: {error}. Given were {given}.{cure}"
                ) from error
        return _on_cpu(outputs)

    @abstractmethod
    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What it returns for inputs that it may write into."""


class ModuleRunner(TorchRunner):
    """A module in a mode, left as it was found: mode of every submodule, buffers, random state."""

    def __init__(self, module: nn.Module, mode: str) -> None:
        self.name, self.module, self._mode = type(module).__name__, module, mode

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
        outputs, _ = self.run_with_buffers(args, kwargs)
        return outputs

    def run_with_buffers(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The outputs by path, and the buffers as the call leaves them by name."""
        with preserved(self.module):
            self.module.train(self._mode == "train")
            return super().run(args, kwargs), _on_cpu(dict(self.module.named_buffers()))

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.module(*args, **kwargs)


class ProgramRunner(TorchRunner):
    """A .pt2 file of torch.export, or one of TorchScript, whose every call starts from the tensors of the file.

    Raises:
        CompareError: there is none of that name, or torch cannot load it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = Path(path).name
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)
                self.module = _load_script(path) if Path(path).suffix == ".pt" else _load_program(path)
        except Exception as error:  # torch raises whatever its reader raises
            raise CompareError(f"'{path}' cannot be loaded by torch: {type(error).__name__}: {error}") from error

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
        with preserved(self.module):
            return super().run(args, kwargs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(self.module, torch.jit.ScriptModule):
            schema = self.module.forward.schema  # type: ignore[attr-defined]
            names = [argument.name for argument in schema.arguments[1:]]
            return self.module(*match_inputs(names, args, kwargs).values())
        call = as_captured(self.module.graph, Call(args, kwargs))
        return self.module(*call.args, **call.kwargs)


def _load_program(path: str | os.PathLike[str]) -> fx.GraphModule:
    program: fx.GraphModule = read_program(path, maps=True).module()
    return program


def _load_script(path: str | os.PathLike[str]) -> torch.jit.ScriptModule:
    script: torch.jit.ScriptModule = torch.jit.load(os.fspath(path))
    return script


Runner = TorchRunner | Session  # a name, a tolerance of its own, and a call that returns tensors by name, on the CPU


def runner_of(item: Any, mode: str) -> Runner:
    """What runs a module or a file.

    Raises:
        CompareError: it is neither, cannot be loaded, or has no train mode where that is asked for. SuffixError: a file
            of another format.
    """
    if isinstance(item, nn.Module):
        return ModuleRunner(item, mode)
    if not isinstance(item, str | os.PathLike):
        raise CompareError(
            f"a {type(item).__name__} was given to compare; it takes modules and paths of .onnx, .pt2 and .pt files. "
            f"{_way_to_a_runner(item)}"
        )
    cure = "Of weights or a file of fxprune.save, give the module: after load_state_dict, or what fxprune.load returns."
    check_suffix(item, ".onnx", *PROGRAM_SUFFIXES, what="compared", cure=cure)
    if mode == "train":
        raise CompareError(f"'{item}' has no train mode: compare it with mode='eval'.")
    return Session(item) if Path(item).suffix == ".onnx" else ProgramRunner(item)


def _way_to_a_runner(item: object) -> str:
    if isinstance(item, type):
        return f"Give an instance of {item.__name__}."
    if isinstance(item, OrderedDict):
        return "A state dict is loaded into its model first: model.load_state_dict(state)."
    if isinstance(item, torch.Tensor | tuple | list | dict):
        return "Inputs are given by name: compare(reference, candidate, inputs=x)."
    return "Give one of these."


def _on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}
