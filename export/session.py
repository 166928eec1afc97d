"""Running an ONNX file in onnxruntime with the inputs that a torch module takes."""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import torch.utils._pytree as pytree
from torch import fx

from fxprune.errors import CompareError, ProviderWarning

# Relative to the largest value of an output; None: by the output's dtype. float16 rounds at 5e-4; an int8 step is 1/255
# of a tensor's range, and some ten to a hundred layers add theirs up.
RTOL: dict[str, float | None] = {"float32": None, "float16": 1e-2, "int8": 0.1}


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a pytree with their paths, as in `logits`, `[0]`, `state.h[1]`; a bare leaf has the path ''."""
    try:
        leaves, _ = pytree.tree_flatten_with_path(tree)
    except ValueError:  # a registered node type without key paths
        return [(f"[{i}]", leaf) for i, leaf in enumerate(pytree.tree_leaves(tree))]
    return [(named_key(path), leaf) for path, leaf in leaves]


def named_key(path: Any) -> str:
    """A path of torch's pytree as text."""
    return "".join(map(_step, path)).removeprefix(".")


def _step(key: Any) -> str:
    if isinstance(key, pytree.SequenceKey):
        return f"[{key.idx}]"
    return f".{key.name if isinstance(key, pytree.GetAttrKey) else key.key}"


def identifier(path: str, prefix: str) -> str:
    """A path of `named_leaves` as a name for an ONNX value: `[0]` with the prefix `output` gives `output_0`."""
    name = re.sub(r"\W+", "_", path).strip("_")
    return name if name and not name[0].isdigit() else f"{prefix}_{name}".rstrip("_")


def tensors_of(value: Any, owner: str) -> dict[str, torch.Tensor]:
    """The tensors in an output by path, numbers as 0-dimensional tensors; None is skipped.

    Raises:
        CompareError: the output holds something else, for instance an object that is no registered pytree.
    """
    found: dict[str, torch.Tensor] = {}
    for path, leaf in named_leaves(value):
        if dataclasses.is_dataclass(leaf):
            inner = {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}
            found |= {f"{path}.{k}".removeprefix("."): v for k, v in tensors_of(inner, owner).items()}
            continue
        if isinstance(leaf, int | float | complex):
            leaf = torch.tensor(leaf)
        if isinstance(leaf, torch.Tensor):
            found[path or "output"] = leaf
        elif leaf is not None:
            raise CompareError(
                f"{owner} returns a {type(leaf).__name__} at '{path or 'output'}', which cannot be compared. Return "
                "tensors in tuples, lists, dicts, or classes registered with torch.export.register_dataclass."
            )
    return found


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[torch.Tensor], list[tuple[str, torch.Tensor]]]:
    """The tensors by order, and those by name."""
    by_name = [(identifier(p, "input"), v) for p, v in named_leaves(kwargs) if isinstance(v, torch.Tensor)]
    return [v for v in pytree.tree_leaves(args) if isinstance(v, torch.Tensor)], by_name


def match(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a call by the names of a file's inputs, in their order; ValueError when the number differs.

    Keyword arguments are matched by name where the names agree, all others by order; what is no tensor is left out.
    """
    by_order, given = _given(args, kwargs)
    by_name = {name: value for name, value in given if name in names}
    by_order += [value for name, value in given if name not in by_name]
    found = by_name | dict(zip([name for name in names if name not in by_name], by_order, strict=True))
    return {name: found[name] for name in names}


def as_captured(
    graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call with its arguments by position and by name as a graph was captured with them, where the names fit."""
    info = graph._codegen.pytree_info  # type: ignore[attr-defined]
    names, count = info.orig_args, info.in_spec.child(0).num_children
    bound = dict(zip(names, args, strict=False)) | kwargs
    if len(args) + len(kwargs) != len(names) or bound.keys() != set(names):
        return args, kwargs
    return tuple(bound[n] for n in names[:count]), {n: bound[n] for n in names[count:]}


class Session:
    """An ONNX file loaded in onnxruntime.

    Args:
        path: the file; external data is looked for beside it.
        providers: onnxruntime's execution providers, in order of preference.
        threads: within operators; None: onnxruntime's choice.

    Attributes:
        name: the file's name. inputs: types and shapes by name, in order. outputs: the names of its outputs.
        metadata: what the file says of itself, by key. rtol: the tolerance of its precision, where it states that.
        providers: those that it runs on. placement: how many operators each of them runs.

    Raises:
        CompareError: the file is missing, truncated, not ONNX, or holds an operator that onnxruntime cannot run; or
            this build of onnxruntime lacks a provider.

    Warns:
        ProviderWarning: onnxruntime dropped a provider that was asked for, or placed no operator on the first one.

    Example:
        >>> Session("linear.onnx").run((torch.randn(1, 4),), {})["output"].shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        providers: Sequence[str] = ("CPUExecutionProvider",),
        threads: int | None = None,
    ) -> None:
        self.name, self.path = Path(path).name, path
        if not Path(path).is_file():
            found = "a folder" if Path(path).is_dir() else "nothing"
            raise CompareError(f"'{path}' was to be run; there is {found} of that name. Give an .onnx file's path.")
        offered = onnxruntime.get_available_providers()
        if lacking := [p for p in providers if p not in offered]:
            raise CompareError(f"onnxruntime was to run '{path}' with {lacking}; this build offers {offered}.")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only: warnings tell of choices inside onnxruntime
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if threads:
            options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(os.fspath(path), options, providers=list(providers))
        except Exception as error:  # onnxruntime's classes share no base of their own
            raise CompareError(
                f"'{path}' ({Path(path).stat().st_size} bytes) cannot be loaded by onnxruntime "
                f"{onnxruntime.__version__}: {error}. A file that is damaged or not ONNX must be written again; an "
                "operator that is not implemented for its type needs the model in float32."
            ) from error
        self.inputs = {value.name: f"{value.type} {value.shape}" for value in self._session.get_inputs()}
        self.outputs = [value.name for value in self._session.get_outputs()]
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        precision = self.metadata.get("fxprune.precision", "")
        self.rtol, self._half = RTOL.get(precision), precision == "float16"
        self.providers: list[str] = self._session.get_providers()
        parts = self._session.get_provider_graph_assignment_info()
        self.placement = dict(sum((Counter({part.ep_name: len(part.get_nodes())}) for part in parts), Counter[str]()))
        dropped = [p for p in providers if p not in self.providers]
        if dropped or (self.placement and providers[0] not in self.placement):
            warnings.warn(
                f"'{path}' was to run with {list(providers)}; onnxruntime runs it with {self.placement}. A provider "
                "whose libraries do not load is dropped: install what it needs, or ask for the one it runs with.",
                ProviderWarning,
                stacklevel=2,
            )
        self._device = "cuda" if self.placement.get("CUDAExecutionProvider") else "cpu"

    def feed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, np.ndarray]:
        """The arrays by input name; float32 is rounded where a file of precision float16 takes it.

        They are matched as `match` says; what is not a tensor was fixed when the file was written.

        Raises:
            CompareError: the number or a type of the inputs differs from the file's.
        """
        try:
            found = match(list(self.inputs), args, kwargs)
            for name, value in found.items():
                if self._half and value.dtype == torch.float32 and self.inputs[name].startswith("tensor(float16)"):
                    found[name] = value.half()
            return {name: value.detach().cpu().numpy() for name, value in found.items()}
        except (ValueError, TypeError) as error:
            raise self._refusal(error, args, kwargs) from error

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Run the file and return its outputs by name, on the CPU, those of precision float16 widened to float32.

        Raises:
            CompareError: number, type or shape of the inputs differ from the file's (see `feed`).
        """
        feed = self.feed(args, kwargs)
        try:
            bound = self._device != "cpu"
            values = [v.numpy() for v in self.bind(feed)()] if bound else self._session.run(None, feed)
        except Exception as error:
            raise self._refusal(error, args, kwargs) from error
        for name, value in zip(self.outputs, values, strict=True):
            if not isinstance(value, np.ndarray | np.generic):
                raise CompareError(f"output '{name}' of '{self.name}' is a {type(value).__name__}, not a tensor.")
        outputs = {name: torch.from_numpy(np.array(value)) for name, value in zip(self.outputs, values, strict=True)}
        return {name: v.float() if self._half and v.dtype == torch.float16 else v for name, v in outputs.items()}

    def random(self, batch: int) -> dict[str, np.ndarray]:
        """Normal numbers, and ones for integers, in the file's shapes; free sizes are `batch` on axis 0, else 1."""
        generator, found = np.random.default_rng(0), {}
        for value in self._session.get_inputs():
            shape = [d if isinstance(d, int) else batch if a == 0 else 1 for a, d in enumerate(value.shape)]
            kind = np.dtype({"float": "f4", "double": "f8"}.get(value.type[7:-1], value.type[7:-1]))
            array = generator.standard_normal(shape) if kind.kind == "f" else np.ones(shape)
            found[value.name] = array.astype(kind)
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

    def _refusal(self, error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CompareError:
        by_order, by_name = _given(args, kwargs)
        got = [f"{v.dtype} {list(v.shape)}" for v in (*by_order, *dict(by_name).values())]
        return CompareError(
            f"'{self.name}' cannot run these inputs: {error}. It takes {self.inputs}; given were "
            f"{len(by_order)} by order and {[*dict(by_name)]} by name: {got}."
        )
