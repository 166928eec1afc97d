"""The inputs and outputs of a call: their tensors by name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from fxprune.capture.caches import CachePath, cache_paths, is_cache
from fxprune.capture.structures import register_classes
from fxprune.errors import CompareError
from fxprune.graph.arguments import Signature
from fxprune.graph.calls import Call


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a pytree with their paths, as in `logits`, `[0]`, `state.h[1]`; a bare leaf has the path ''."""
    try:
        leaves, _ = pytree.tree_flatten_with_path(tree, is_leaf=is_cache)
    except ValueError:  # a registered node type without key paths
        return [(f"[{i}]", leaf) for i, leaf in enumerate(pytree.tree_leaves(tree))]
    return [named for path, leaf in leaves for named in _named(path_text(path), leaf)]


def _named(path: str, leaf: Any) -> list[tuple[str, Any]]:
    if not is_cache(leaf):
        return [(path, leaf)]
    register_classes(leaf)
    inner, _ = pytree.tree_flatten_with_path(leaf)
    names: list[str] = list(cache_paths(leaf, path))
    if len(names) != len(inner):  # registered by others, in another form
        names = [f"{path}.{path_text(steps)}" for steps, _ in inner]
    return [(name, value) for name, (_, value) in zip(names, inner, strict=True)]


def path_text(path: Any) -> str:
    """A path of torch's pytree as text."""
    return "".join(map(_step, path)).removeprefix(".")


def _step(key: Any) -> str:
    if isinstance(key, pytree.SequenceKey):
        return f"[{key.idx}]"
    return f".{key.name if isinstance(key, pytree.GetAttrKey) else key.key}"


def identifier(path: str, prefix: str) -> str:
    """A path of `named_leaves` as a name for an ONNX value: `[0]` with the prefix `output` gives `output_0`.

    What a cache holds keeps its dots, and is called `present.0.key` among the outputs, as optimum has it.
    """
    if isinstance(path, CachePath):
        return f"present{path[path.index('.') :]}" if prefix == "output" and "." in path else str(path)
    name = re.sub(r"\W+", "_", path).strip("_")
    return name if name and not name[0].isdigit() else f"{prefix}_{name}".rstrip("_")


def output_tensors(value: Any, owner: str) -> dict[str, torch.Tensor]:
    """The tensors in an output by path, numbers as 0-dimensional tensors; None is skipped.

    Raises:
        CompareError: the output of `owner` holds something else, for instance an object that is no registered pytree.
    """
    found: dict[str, torch.Tensor] = {}
    for path, leaf in named_leaves(value):
        if dataclasses.is_dataclass(leaf):
            fields = {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}
            inner = output_tensors(fields, owner)
            found |= {f"{path}.{name}".removeprefix("."): tensor for name, tensor in inner.items()}
        elif isinstance(leaf, torch.Tensor):
            found[path or "output"] = leaf
        elif isinstance(leaf, int | float | complex):
            found[path or "output"] = torch.tensor(leaf)
        elif leaf is not None:
            raise CompareError(
                f"{owner} returns a {type(leaf).__name__} at '{path or 'output'}', which cannot be compared. Return "
                "tensors in tuples, lists, dicts, or classes registered with torch.export.register_dataclass."
            )
    return found


def input_tensors(
    args: tuple[Any, ...], kwargs: dict[str, Any], names: Collection[str] = ()
) -> tuple[list[torch.Tensor], list[tuple[str, torch.Tensor]]]:
    """The tensors of a call: those given by order, and those by name, as a file's inputs are or as in `names`."""
    leaves = [(path, value) for path, value in named_leaves(kwargs) if isinstance(value, torch.Tensor)]
    by_name = [(path if path in names else identifier(path, "input"), value) for path, value in leaves]
    return [v for v in pytree.tree_leaves(args) if isinstance(v, torch.Tensor)], by_name


def captured_names(graph: fx.Graph, call: Call) -> list[str | None]:
    """The names of the tensors in a call's caches, None for its other tensors; in the order of the captured inputs."""
    arranged = as_captured(graph, call)
    given = dict(zip(Signature.of(graph).names, [*arranged.args, *arranged.kwargs.values()], strict=True))
    found = [(path, leaf) for path, leaf in named_leaves(given) if isinstance(leaf, torch.Tensor)]
    return [identifier(path, "input") if isinstance(path, CachePath) else None for path, _ in found]


def match_inputs(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a call by the names of a file's inputs, in their order; ValueError when the number differs.

    Keyword arguments are matched by name where the names agree, all others by order; what is no tensor is left out.
    """
    by_order, given = input_tensors(args, kwargs, names)
    by_name = {name: value for name, value in given if name in names}
    by_order += [value for name, value in given if name not in by_name]
    if len(by_order) + len(by_name) != len(names):
        hint = " (labels are no input)" if len(by_order) + len(by_name) == len(names) + 1 else ""
        raise ValueError(f"{len(by_order) + len(by_name)} inputs were given where {len(names)} are taken{hint}")
    found = by_name | dict(zip([name for name in names if name not in by_name], by_order, strict=True))
    return {name: found[name] for name in names}


def dtype_name(tensor: torch.Tensor) -> str:
    """As in `float32`."""
    return str(tensor.dtype).removeprefix("torch.")


def as_captured(graph: fx.Graph, call: Call) -> Call:
    """The call with each argument by position or by name as the graph was captured with it; else unchanged."""
    return Call(*(Signature.of(graph).arrange(*call) or call))
