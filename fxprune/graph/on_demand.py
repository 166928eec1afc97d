"""Tensors that are computed whenever an operator reads them, and held by nobody."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxprune.graph.names import tensors_of
from fxprune.graph.working_memory import slices_at_once
from fxprune.torch_internals import storage_users
from fxprune.wrapper_tensors import SERIALS, View, WrapperTensor

LEAST = 2**16  # bytes: what has fewer is computed once, and held


class Latest:
    """The values that were asked for last, of one tensor among several: who reads a part goes on with the next one.

    They stand in the same memory one after the other, as long as nobody else has views of it.

    Args:
        room: bytes of the largest of the tensors.
    """

    def __init__(self, room: int) -> None:
        self._room, self._memory = room, torch.empty(0, dtype=torch.uint8)
        self._key: object = None
        self._values: Tensor | None = None

    def of(self, key: object, compute: Callable[[Tensor], object], form: Tensor, device: torch.device) -> Tensor:
        """The values of a key, computed unless they were asked for last; the others are as for `OnDemand`."""
        if self._key is not key or self._values is None:
            self._key = self._values = None
            found = self._free(form.untyped_storage().nbytes(), device).view(form.dtype)
            values = found.as_strided(form.shape, form.stride())
            with torch.no_grad():
                compute(values)
            self._key, self._values = key, values
        return self._values

    def _free(self, size: int, device: torch.device) -> Tensor:
        """So many bytes that nobody else uses."""
        used = storage_users(self._memory) > 0
        if used or self._memory.nbytes < size or self._memory.device != device:
            del self._memory
            self._memory = torch.empty(max(size, self._room), dtype=torch.uint8, device=device)
        return self._memory[:size]


class OnDemand(WrapperTensor):
    """A tensor that is only read; a function computes its values each time.

    Args:
        compute: writes the values, the same each time. form: of their shape, dtype and strides, on the device "meta".
        device: that of the values. latest: shared with others.

    Example:
        >>> form = torch.empty(2, 3, device="meta")
        >>> ones = OnDemand(lambda out: out.fill_(1), form, torch.device("cpu"), Latest(form.nbytes))
        >>> ones.t().sum(0)
        tensor([3., 3.])
    """

    _source: tuple[Callable[[Tensor], object], Tensor, Latest, int]  # with the form before any view, and the serial

    @staticmethod
    def __new__(
        cls, compute: Callable[[Tensor], object], form: Tensor, device: torch.device, latest: Latest
    ) -> OnDemand:
        made = cls._wrapped(form, device, ())
        made._source = (compute, form, latest, next(SERIALS))
        return made

    def _viewed(self, views: tuple[View, ...], form: Tensor) -> OnDemand:
        made = self._wrapped(form, self.device, views)
        made._source = self._source
        return made

    @classmethod
    def _result(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        plain_args, plain_kwargs = pytree.tree_map_only(OnDemand, OnDemand.whole, (args, kwargs))
        return func(*plain_args, **plain_kwargs)

    def whole(self) -> Tensor:
        """All values, a plain tensor that is not to be written to."""
        compute, form, latest, _ = self._source
        return self._taken_of(latest.of(compute, compute, form, self.device))

    @property
    def _serial(self) -> int:
        return self._source[3]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            values = self.whole().clone()
            is_parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = nn.Parameter(values, self.requires_grad) if is_parameter else values
        found: Tensor = memo[id(self)]
        return found


def masked_on_demand(values: Tensor, mask: Callable[[], Tensor], latest: Latest) -> Tensor:
    """A parameter times its mask, computed whenever it is read; at once where that is small.

    Args:
        values: of the parameter, detached. mask: gives the mask, on the same device.
        latest: shared between those that are read in turns.
    """
    if values.nbytes < LEAST or type(values) not in (Tensor, OnDemand):
        return mask() * values
    form = torch.empty_like(values, device="meta")
    return OnDemand(lambda out: _multiply(mask(), values, out), form, values.device, latest)


def _multiply(mask: Tensor, values: Tensor, out: Tensor) -> None:
    """A product, some rows at a time: of a mask of another type torch makes one of the type of the values first."""
    many = slices_at_once(out[:1].nbytes)
    for row in range(0, len(out), many):
        rows = slice(row, row + many)
        torch.mul(mask[rows], values[rows], out=out[rows])


def own_tensors(final: nn.Module, traced: nn.Module) -> None:
    """Copy what a module still shares with another one, or computes; what is tied, or overlaps, is so in the copy."""
    shared = {id(tensor) for tensor in tensors_of(traced).values()}
    memo: dict[int, Any] = {}
    for module in final.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if id(tensor) in shared or isinstance(tensor, OnDemand):
                    held[name] = copy.deepcopy(tensor, memo)  # type: ignore[assignment]
