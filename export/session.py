"""Running an ONNX file in onnxruntime with the inputs that a torch module takes."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import torch.utils._pytree as pytree

from fxprune.errors import CompareError


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a pytree with their paths, as in `logits`, `[0]`, `state.h[1]`; a bare leaf has the path ''."""
    try:
        leaves, _ = pytree.tree_flatten_with_path(tree)
    except ValueError:  # a registered node type without key paths
        return [(f"[{i}]", leaf) for i, leaf in enumerate(pytree.tree_leaves(tree))]
    return [("".join(map(_step, path)).removeprefix("."), leaf) for path, leaf in leaves]


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


class Session:
    """An ONNX file loaded in onnxruntime.

    Args:
        path: the file; external data is looked for beside it.
        providers: onnxruntime's execution providers, in order of preference.

    Attributes:
        name: the file's name. inputs, outputs: the names of its inputs and outputs, in order.

    Raises:
        CompareError: the file is missing, truncated, not ONNX, or holds an operator that onnxruntime cannot run; or
            this build of onnxruntime lacks a provider.

    Example:
        >>> Session("linear.onnx").run((torch.randn(1, 4),), {})["output"].shape
        torch.Size([1, 2])
    """

    def __init__(self, path: str | os.PathLike[str], providers: Sequence[str] = ("CPUExecutionProvider",)) -> None:
        self.name = Path(path).name
        if not Path(path).is_file():
            found = "a folder" if Path(path).is_dir() else "nothing"
            raise CompareError(f"'{path}' was to be run; there is {found} of that name. Give an .onnx file's path.")
        offered = onnxruntime.get_available_providers()
        if lacking := [p for p in providers if p not in offered]:
            raise CompareError(f"onnxruntime was to run '{path}' with {lacking}; this build offers {offered}.")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only: warnings tell of choices inside onnxruntime
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

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Run the file and return its outputs by name, on the CPU.

        Keyword arguments are matched with the file's inputs by name where the names agree; all others by order.
        What is not a tensor was fixed when the file was written and is not passed.

        Raises:
            CompareError: number, type or shape of the inputs differ from the file's.
        """
        given = [(identifier(p, "input"), v) for p, v in named_leaves(kwargs) if isinstance(v, torch.Tensor)]
        by_name = {name: value for name, value in given if name in self.inputs}
        by_order = [v for v in pytree.tree_leaves(args) if isinstance(v, torch.Tensor)]
        by_order += [value for name, value in given if name not in by_name]
        rest = [name for name in self.inputs if name not in by_name]
        try:
            feed = by_name | dict(zip(rest, by_order, strict=True))
            values = self._session.run(None, {name: value.detach().cpu().numpy() for name, value in feed.items()})
        except Exception as error:
            got = [f"{v.dtype} {list(v.shape)}" for v in (*by_order, *by_name.values())]
            raise CompareError(
                f"'{self.name}' cannot run these inputs: {error}. It takes {self.inputs}; given were "
                f"{len(by_order)} by order and {list(by_name)} by name: {got}."
            ) from error
        for name, value in zip(self.outputs, values, strict=True):
            if not isinstance(value, np.ndarray | np.generic):
                raise CompareError(f"output '{name}' of '{self.name}' is a {type(value).__name__}, not a tensor.")
        return {name: torch.from_numpy(np.array(value)) for name, value in zip(self.outputs, values, strict=True)}
