"""A call that can be repeated, though forward may write into what it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fxprune.capture.caches import MODULE, is_cache


class RepeatedCall:
    """Calls forward with the same arguments as they were at first.

    Attributes:
        given: the tensors among the arguments.
    """

    def __init__(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._forward, self._args, self._kwargs = forward, args, kwargs
        self.given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        leaves = pytree.tree_leaves((args, kwargs), is_leaf=is_cache)
        holders = [holder for leaf in leaves if is_cache(leaf) for holder in _holders(leaf)]
        self._held = [(holder, holder.copy()) for holder in holders]
        inside = [value for holder in holders for value in _values(holder) if isinstance(value, Tensor)]
        written = {id(tensor): tensor for tensor in (*self.given, *inside) if not _is_expanded(tensor)}
        self._saved = [(tensor, tensor.clone()) for tensor in written.values()]

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """Of the tensors that are given."""
        return tuple(tensor.shape for tensor in self.given)

    def __call__(self) -> Any:
        """The outputs of forward on what it was given at first."""
        for holder, held in self._held:
            holder.clear()
            holder.extend(held) if isinstance(holder, list) else holder.update(held)
        for tensor, saved in self._saved:
            tensor.copy_(saved)
        return self._forward(*self._args, **self._kwargs)


def _holders(value: Any) -> Iterator[Any]:
    """The lists and dicts below a cache, and those of the attributes of it and its layers."""
    if type(value).__module__ == MODULE or is_cache(value):
        value = vars(value)
    if isinstance(value, list | dict):
        yield value
        for inner in _values(value):
            yield from _holders(inner)


def _values(holder: Any) -> list[Any]:
    return holder if isinstance(holder, list) else list(holder.values())


def _is_expanded(tensor: Tensor) -> bool:
    """Whether several places of a tensor are one in memory, so that nothing can write into it."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
