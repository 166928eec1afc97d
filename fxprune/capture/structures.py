"""Structures of inputs and outputs that torch does not take as they are: dataclasses, caches, arguments by star."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxprune.capture.caches import is_cache, register_cache
from fxprune.torch_internals import register_named_tuple


def register_classes(value: Any) -> None:
    """Make the dataclasses, named tuples and caches in a structure known to torch, those within others too.

    For the life of the process: a captured graph takes every later call apart, and builds every result, by the
    specification that holds the class; without the registration these would fail.
    """
    for leaf in pytree.tree_leaves(value, is_leaf=_is_named_tuple):
        kind = type(leaf)
        if _is_named_tuple(leaf):
            register_named_tuple(kind)
            register_classes(tuple(leaf))
        elif is_cache(leaf):
            register_cache(kind)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            torch.export.register_dataclass(kind, serialized_type_name=f"{kind.__module__}.{kind.__qualname__}")
            register_classes(leaf)


def _is_named_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(type(value), "_fields")


@contextlib.contextmanager
def outputs_registered(model: nn.Module) -> Iterator[None]:
    """Make the classes that the model returns known to torch, as soon as it returns them."""
    hook = model.register_forward_hook(lambda module, args, output: register_classes(output))
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def keywords_named(model: nn.Module, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Have forward name the keyword arguments that it takes by `**`: torch.export frees no sizes of these otherwise."""
    signature = inspect.signature(model.forward)
    rest = [p for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    more = [name for name in kwargs if name not in signature.parameters]
    if not rest or not more or any(not name.isidentifier() for name in more):
        yield
        return
    own, forward = vars(model).get("forward"), model.forward

    @functools.wraps(forward)
    def named(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    given = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in more]
    others = [parameter for parameter in signature.parameters.values() if parameter not in rest]
    named.__signature__ = signature.replace(parameters=[*others, *given])  # type: ignore[attr-defined]
    vars(model)["forward"] = named
    try:
        yield
    finally:
        del vars(model)["forward"]
        if own is not None:
            vars(model)["forward"] = own


def spread(model: nn.Module, shapes: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Dynamic shapes in which one entry for a whole cache, such as `{0: batch, 2: past}`, is one for each tensor in it.

    Args:
        model: what is captured. shapes: `torch.export`'s structure, by argument; anything else is left as it is.
        args, kwargs: the sample inputs, whose classes are known to torch.
    """
    if not isinstance(shapes, Mapping):
        return shapes
    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    given |= {name: value for name, value in kwargs.items() if name not in given}
    return {name: _spread(given[name], entry) if name in given else entry for name, entry in shapes.items()}


def _spread(value: Any, entry: Any) -> Any:
    is_whole = isinstance(entry, Mapping) and entry and all(isinstance(axis, int) for axis in entry)
    if not is_whole or not is_cache(value):
        return entry
    return _each(value, entry)


def _each(value: Any, axes: Mapping[int, Any]) -> Any:
    if isinstance(value, Tensor):
        return {axis: dimension for axis, dimension in axes.items() if axis < value.dim()} or None
    if type(value) not in pytree.SUPPORTED_NODES:
        return None
    children, _ = pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)
    return [_each(child, axes) for child in children]


def by_argument(model: nn.Module, shapes: Any) -> Any:
    """Dynamic shapes by the arguments of forward, from those by the names that arguments by star have once captured.

    What is taken by `*xs` is captured as `xs_0`, `xs_1` and so on, what is taken by `**more` under its own names.
    """
    parameters = inspect.signature(model.forward).parameters
    if not isinstance(shapes, Mapping):
        return shapes
    found = dict(shapes)
    for name, parameter in parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD and isinstance(found.get(name), Mapping):
            found |= found.pop(name)
        if parameter.kind is not inspect.Parameter.VAR_POSITIONAL or name in found:
            continue
        entries: list[Any] = []
        while (captured := f"{name}_{len(entries)}") in found and captured not in parameters:
            entries.append(found.pop(captured))
        found |= {name: tuple(entries)} if entries else {}
    return found
