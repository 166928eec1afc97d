"""The form in which inputs are given, everywhere: one call's, or those of several."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fxprune.errors import FxpruneError, InputError

FORMS = "a tensor, a tuple of positional arguments, a dict of keyword arguments, or a Call of both"
WITHOUT_LABELS = "Of batches with labels give the inputs alone: [inputs for inputs, labels in loader]."


class Call(NamedTuple):
    """The inputs of one call: `model(*args, **kwargs)`.

    Example:
        >>> fxprune.compare(model, traced, inputs=fxprune.Call((x,), {"mask": mask}))
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def as_call(
    inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    error: type[FxpruneError] = InputError,
    where: str = "",
) -> Call:
    """The inputs of one call, in whichever form they are given.

    Args:
        inputs: a tensor, a tuple of positional arguments, a mapping of keyword arguments, or a `Call` of both.
        kwargs: keyword arguments beside these.
        error: what to raise.
        where: says in errors what they are, as in " among the samples".

    Raises:
        The class `error`: they are something else, or an argument is given twice.

    Example:
        >>> as_call(x), as_call((x, mask)), as_call({"ids": x})
        (Call(args=(x,), kwargs={}), Call(args=(x, mask), kwargs={}), Call(args=(), kwargs={'ids': x}))
    """
    if not isinstance(kwargs, Mapping | None):
        raise error(
            f"the keyword inputs{where} are a {type(kwargs).__name__}; they are given by name. Several inputs by "
            "position stand in a tuple; labels are no input."
        )
    more = dict(kwargs or {})
    if isinstance(inputs, Call):
        args, by_name = inputs
    elif isinstance(inputs, Mapping):
        args, by_name = (), dict(inputs)
    elif isinstance(inputs, torch.Tensor):
        args, by_name = (inputs,), {}
    elif isinstance(inputs, tuple):
        args, by_name = tuple(inputs), {}
    else:
        raise error(f"inputs hold a {type(inputs).__name__}{where}; {FORMS} is needed. {_way_to_a_call(inputs)}")
    if twice := sorted(by_name.keys() & more.keys()):
        raise error(f"{', '.join(twice)} is given twice{where}: among the inputs and by name. Leave one out.")
    return Call(args, by_name | more)


def as_calls(inputs: Any, *, error: type[FxpruneError] = InputError, where: str = "") -> list[Call]:
    """The inputs of several calls: one of the forms of `as_call`, or a list, a loader or another iterable of these.

    A list of one within a list is a tuple of one, since loaders of tensors alone give such.

    Raises:
        The class `error`: one of them is something else, or the list is a batch with its labels.
    """
    if not _is_many(inputs):
        return [as_call(inputs, error=error, where=where)]
    items = [*inputs]
    source = "a list" if isinstance(inputs, list) else f"a {type(inputs).__name__}"
    dtypes = dict.fromkeys(str(item.dtype).removeprefix("torch.") for item in items if isinstance(item, torch.Tensor))
    if len(dtypes) > 1:
        raise error(
            f"inputs is {source} of tensors of several types{where} ({', '.join(dtypes)}), which would be several "
            f"calls. {WITHOUT_LABELS} Several arguments of one call stand in a tuple."
        )
    if not isinstance(inputs, list):
        where = f", of {source}{where}"
    singles = (tuple(item) if isinstance(item, list) and len(item) == 1 else item for item in items)
    return [as_call(item, error=error, where=where) for item in singles]


def each_call(inputs: Any, *, error: type[FxpruneError] = InputError) -> Iterator[Call]:
    """The calls of `as_calls` one by one: a loader is asked for the next batch when the last one is done with.

    Raises:
        The class `error`: as `as_calls`, when the call is reached.
    """
    if isinstance(inputs, list) or not _is_many(inputs):
        yield from as_calls(inputs, error=error)
        return
    for item in inputs:
        yield from as_calls([item], error=error, where=f", of a {type(inputs).__name__}")


def cloned(tree: Any) -> Any:
    """Copies of the tensors in nested inputs; what was one tensor stays one."""
    copies: dict[int, torch.Tensor] = {}

    def clone(tensor: torch.Tensor) -> torch.Tensor:
        return copies.setdefault(id(tensor), tensor.detach().clone())

    return pytree.tree_map_only(torch.Tensor, clone, tree)


_SINGLE = (tuple, Mapping, torch.Tensor, np.ndarray, np.generic, str, bytes, os.PathLike, nn.Module)


def _is_many(inputs: object) -> bool:
    return isinstance(inputs, Iterable) and not isinstance(inputs, _SINGLE)


def _way_to_a_call(item: object) -> str:
    if isinstance(item, np.ndarray | np.generic):
        return "Convert it: torch.from_numpy(array)."
    if isinstance(item, list | DataLoader | Dataset):
        return f"{WITHOUT_LABELS} Several arguments of one call stand in a tuple."
    return "Give what the model is called with."
