"""How much work single calls do: while numbers are tried, what a model never does is not waited for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fxprune.errors import WriteBackError

_MORE = 4  # times the work that a model does
_ATTENTION = functional.scaled_dot_product_attention
_PRODUCTS = (torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__)


class Effort(TorchFunctionMode):
    """Inside the block, the largest product or attention is noted; one far beyond a limit is not carried out.

    A wrong size of heads makes positions of channels, and attention over all of these.

    Attributes:
        largest: multiplications of the largest call.
    """

    def __init__(self, usual: float = math.inf) -> None:
        """`usual`: multiplications of the largest call of the model as it is."""
        super().__init__()
        self.largest = 0.0
        self._usual = usual

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Carry out a call, unless it is too large."""
        work = _work(func, args)
        self.largest = max(self.largest, work)
        if work > _MORE * self._usual:
            raise WriteBackError(
                f"{work:.1e} multiplications in one call, where the model has {self._usual:.1e} at most"
            )
        return func(*args, **(kwargs or {}))


def _work(func: Any, args: Sequence[Any]) -> float:
    """The multiplications of a product of tensors or an attention over positions, 0 for any other call."""
    if len(args) < 2 or not all(isinstance(operand, Tensor) for operand in args[:2]):
        return 0.0
    left, right = args[:2]
    if func is not _ATTENTION and (func not in _PRODUCTS or right.dim() < 2):
        return 0.0
    more: int = right.shape[-2 if func is _ATTENTION else -1]
    return float(left.numel() * more)
