"""Tensors that are one vector, expanded: the same along all axes but some, in memory of those alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def is_expanded(tensor: Tensor) -> bool:
    """Whether entries of a plain tensor share memory along an axis, as `Tensor.expand` makes them do.

    Example:
        >>> is_expanded(torch.ones(2, 1).expand(2, 3)), is_expanded(torch.ones(2, 3))
        (True, False)
    """
    return type(tensor) is Tensor and any(_repeats(tensor))


def is_one_value(tensor: Tensor) -> bool:
    """Whether all entries of a plain tensor are one in memory.

    Example:
        >>> is_one_value(torch.ones(()).expand(2, 3)), is_one_value(torch.ones(2, 1).expand(2, 3))
        (True, False)
    """
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return type(tensor) is Tensor and tensor.numel() > 1 and all(size == 1 or stride == 0 for size, stride in pairs)


def vector_of(tensor: Tensor) -> Tensor:
    """The entries of a tensor that others share memory with, once each, a view with as many axes.

    Example:
        >>> vector_of(torch.ones(2, 1).expand(2, 3)).shape
        torch.Size([2, 1])
    """
    return tensor[tuple(slice(0, 1) if repeats else slice(None) for repeats in _repeats(tensor))]


def by_vectors(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """What a function of entries gives, computed once for those that share memory, and expanded.

    Where the tensors, of one shape, are not all expanded along the same axes it is given them as they are.

    Example:
        >>> by_vectors(torch.neg, torch.ones(2, 1).expand(2, 3)).stride()
        (1, 0)
    """
    first = tensors[0]
    if not all(is_expanded(each) and _repeats(each) == _repeats(first) for each in tensors):
        return function(*tensors)
    return function(*(vector_of(each).contiguous() for each in tensors)).expand(first.shape)


def _repeats(tensor: Tensor) -> list[bool]:
    return [size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
