"""Running an ONNX file in onnxruntime with the inputs that a torch module takes."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from fxprune.calling import renamed
from fxprune.errors import ArgumentTypeError, CompareError, ProviderWarning
from fxprune.files import check_suffix
from fxprune.graph.calls import as_call
from fxprune.graph.requirements import require_list

from .values import input_tensors, match_inputs

# Of files, relative to the largest value of an output; None: by the output's dtype. float16 rounds at 5e-4; an int8
# step is 1/255 of a tensor's range, and some ten to a hundred layers add theirs up.
PRECISION_TOLERANCES: dict[str, float | None] = {"float32": None, "float16": 1e-2, "int8": 0.1}

_NUMPY_NAMES = {"float": "float32", "double": "float64"}  # of onnxruntime's element types that numpy calls otherwise


def session_options(threads: int | None = None) -> onnxruntime.SessionOptions:
    """Options that let onnxruntime say errors only; its warnings tell of choices inside it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    return options


def _load(
    path: str | os.PathLike[str],
    providers: Sequence[str],
    threads: int | None,
    profile_into: str | os.PathLike[str] | None,
    *,
    packs: bool,
    tf32: bool,
) -> onnxruntime.InferenceSession:
    offered = onnxruntime.get_available_providers()
    if lacking := [provider for provider in providers if provider not in offered]:
        raise CompareError(f"onnxruntime was to run '{path}' with {lacking}; this build offers {offered}.")
    options = session_options(threads)
    if profile_into is not None:
        options.enable_profiling = True
        options.profile_file_prefix = os.path.join(profile_into, "profile")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if not packs:
        options.add_session_config_entry("session.disable_prepacking", "1")
    exact = {} if tf32 else {"CUDAExecutionProvider": {"use_tf32": "0"}}
    try:
        return onnxruntime.InferenceSession(
            os.fspath(path), options, providers=[(provider, exact.get(provider, {})) for provider in providers]
        )
    except Exception as error:  # onnxruntime's classes share no base of their own
        raise CompareError(
            f"'{path}' ({Path(path).stat().st_size} bytes) cannot be loaded by onnxruntime "
            f"{onnxruntime.__version__}: {error}. A file that is damaged or not ONNX must be written again; an "
            "operator that is not implemented for its type needs the model in float32."
        ) from error


class Session:
    """An ONNX file loaded in onnxruntime.

    Args:
        path: the file; external data is looked for beside it.
        providers: onnxruntime's execution providers, in order of preference.
        threads: within operators; None: onnxruntime's choice.
        profile_into: a folder into which onnxruntime's profiler writes, until `end_profile`; None: nothing is profiled.
        packs: whether weights are copied in the order in which products run fastest. Without, those in a file beside
            are read where they are, mapped, and take no memory.
        tf32: whether a GPU may round the factors of float32 products to 10 bits, as onnxruntime does by default where
            the GPU can: fast, and too far from the module for a comparison.

    Attributes:
        name: the file's name. inputs: types and shapes by name, in order. outputs: the names of its outputs.
        shapes: of the inputs by name, a text where a size is free.
        metadata: what the file says of itself, by key. rtol: the tolerance of its precision, where it states that.
        providers: those that it runs on. placement: how many operators each of them runs.

    Raises:
        SuffixError: a file of another format. ArgumentTypeError: `providers` is no list, or `threads` no integer.
        CompareError: the file is missing, truncated, not ONNX, or holds an operator that onnxruntime cannot run; or
            this build of onnxruntime lacks a provider.

    Warns:
        ProviderWarning: onnxruntime dropped a provider that was asked for, or placed no operator on the first one.

    Example:
        >>> Session("linear.onnx").run(torch.randn(1, 4))["output"].shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        providers: Sequence[str] = ("CPUExecutionProvider",),
        threads: int | None = None,
        *,
        profile_into: str | os.PathLike[str] | None = None,
        packs: bool = True,
        tf32: bool = False,
    ) -> None:
        require_list("providers", providers)
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int)):
            raise ArgumentTypeError(f"threads={threads!r}: an integer is needed, or None for onnxruntime's choice.")
        if Path(path).suffix in (".pt2", ".pt", ".pth", ".fxp", ".safetensors"):
            check_suffix(path, ".onnx", what="run by onnxruntime", cure="Write it by fxprune.export.to_onnx.")
        self.name, self.path = Path(path).name, path
        if not Path(path).is_file():
            found = "a folder" if Path(path).is_dir() else "nothing"
            raise CompareError(f"'{path}' was to be run; there is {found} of that name. Give an .onnx file's path.")
        self._session = _load(path, providers, threads, profile_into, packs=packs, tf32=tf32)
        self.inputs = {value.name: f"{value.type} {value.shape}" for value in self._session.get_inputs()}
        self.shapes = {value.name: tuple(value.shape) for value in self._session.get_inputs()}
        self.outputs = [value.name for value in self._session.get_outputs()]
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        precision = self.metadata.get("fxprune.precision", "")
        self.rtol, self._half = PRECISION_TOLERANCES.get(precision), precision == "float16"
        self.providers: list[str] = self._session.get_providers()
        placement = Counter[str]()
        for part in self._session.get_provider_graph_assignment_info():
            placement[part.ep_name] += len(part.get_nodes())
        self.placement = dict(placement)
        self._warn_if_placed_elsewhere(providers)
        self._device = "cuda" if self.placement.get("CUDAExecutionProvider") else "cpu"

    def _warn_if_placed_elsewhere(self, asked: Sequence[str]) -> None:
        dropped = [provider for provider in asked if provider not in self.providers]
        if dropped or (self.placement and asked[0] not in self.placement):
            warnings.warn(
                f"'{self.path}' was to run with {list(asked)}; onnxruntime runs it with {self.placement}. A provider "
                "whose libraries do not load is dropped: install what it needs, or ask for the one it runs with.",
                ProviderWarning,
                stacklevel=3,
            )

    @renamed("args", "inputs")
    def feed(self, inputs: Any, kwargs: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
        """The arrays by input name, of inputs as `run` takes them; float32 is rounded where the file takes float16.

        Files take complex numbers as their real and imaginary parts, in an axis more.

        They are matched as `match_inputs` says; what is not a tensor was fixed when the file was written.

        Raises:
            CompareError: the number or a type of the inputs differs from the file's.
        """
        args, by_name = as_call(inputs, kwargs, error=CompareError)
        try:
            found = match_inputs(list(self.inputs), args, by_name)
            for name, value in found.items():
                if self._half and value.dtype == torch.float32 and self.inputs[name].startswith("tensor(float16)"):
                    found[name] = value.half()
                elif value.is_complex():
                    found[name] = torch.view_as_real(value.detach().resolve_conj())
            return {name: value.detach().cpu().numpy() for name, value in found.items()}
        except (ValueError, TypeError) as error:
            raise self._refusal(error, args, by_name) from error

    @renamed("args", "inputs")
    def run(self, inputs: Any, kwargs: Mapping[str, Any] | None = None) -> dict[str, torch.Tensor]:
        """Run the file and return its outputs by name, on the CPU, those of precision float16 widened to float32.

        Args:
            inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or a `Call` of both.
            kwargs: keyword arguments beside these.

        Raises:
            CompareError: number, type or shape of the inputs differ from the file's (see `feed`).
        """
        call = as_call(inputs, kwargs, error=CompareError)
        feed = self.feed(*call)
        try:
            if self._device == "cpu":
                values = self._session.run(None, feed)
            else:
                values = [value.numpy() for value in self.bind(feed)()]
        except Exception as error:  # onnxruntime's classes share no base of their own
            raise self._refusal(error, *call) from error
        outputs: dict[str, torch.Tensor] = {}
        for name, value in zip(self.outputs, values, strict=True):
            if not isinstance(value, np.ndarray | np.generic):
                raise CompareError(f"output '{name}' of '{self.name}' is a {type(value).__name__}, not a tensor.")
            output = torch.from_numpy(np.array(value))
            outputs[name] = output.float() if self._half and output.dtype == torch.float16 else output
        return outputs

    def random(self, batch: int) -> dict[str, np.ndarray]:
        """Normal numbers, and ones for integers, in the file's shapes; free sizes are `batch` on axis 0, else 1."""
        generator = np.random.default_rng(0)
        found: dict[str, np.ndarray] = {}
        for value in self._session.get_inputs():
            shape = [size if isinstance(size, int) else 1 for size in value.shape]
            if value.shape and not isinstance(value.shape[0], int):
                shape[0] = batch
            element = value.type.removeprefix("tensor(").removesuffix(")")
            dtype = np.dtype(_NUMPY_NAMES.get(element, element))
            array = generator.standard_normal(shape) if dtype.kind == "f" else np.ones(shape)
            found[value.name] = array.astype(dtype)
        return found

    def bind(self, feed: dict[str, np.ndarray]) -> Callable[[], list[Any]]:
        """A call that runs on inputs copied to the session's device once, and leaves its outputs there."""
        binding = self._session.io_binding()
        for name, value in feed.items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value, self._device, 0))
        for name in self.outputs:
            binding.bind_output(name, self._device)

        def call() -> list[Any]:
            self._session.run_with_iobinding(binding)
            return list(binding.get_outputs())

        return call

    def end_profile(self) -> Path:
        """End onnxruntime's profile, and return the file of JSON that it wrote."""
        return Path(self._session.end_profiling())

    def _refusal(self, error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CompareError:
        by_order, by_name = input_tensors(args, kwargs)
        got = [f"{value.dtype} {list(value.shape)}" for value in (*by_order, *dict(by_name).values())]
        return CompareError(
            f"'{self.name}' cannot run these inputs: {error}. It takes {self.inputs}; given were "
            f"{len(by_order)} by order and {[*dict(by_name)]} by name: {got}."
        )
