"""Tensors that are computed whenever an operator reads them, and held by nobody."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxprune.borrowing import SHARING, View, is_view
from fxprune.graph.names import tensors_of
from fxprune.torch_internals import storage_users, untouched_by_torch_function

LEAST = 2**16  # bytes: what has fewer is computed once, and held

_SERIALS = itertools.count(1)


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


class OnDemand(Tensor):
    """A tensor that is only read, a plain one to every operator; a function computes its values each time.

    Views of it are as it is: they are taken anew of the values.

    Args:
        compute: writes the values, the same each time. form: of their shape, dtype and strides, on the device "meta".
        device: that of the values. latest: shared with others.

    Example:
        >>> form = torch.empty(2, 3, device="meta")
        >>> ones = OnDemand(lambda out: out.fill_(1), form, torch.device("cpu"), Latest(form.nbytes))
        >>> ones.t().sum(0)
        tensor([3., 3.])
    """

    _compute: Callable[[Tensor], object]
    _whole: Tensor  # the form of what is computed, before any view
    _latest: Latest
    _views: tuple[View, ...]
    _form: Tensor
    _serial: int  # the same for what has the same values
    __torch_function__ = untouched_by_torch_function  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, compute: Callable[[Tensor], object], form: Tensor, device: torch.device, latest: Latest,
        views: tuple[View, ...] = (), base: OnDemand | None = None,
    ) -> OnDemand:  # fmt: skip
        made: OnDemand = Tensor._make_wrapper_subclass(
            cls, form.shape, strides=form.stride(), storage_offset=form.storage_offset(), dtype=form.dtype,
            device=device,
        )  # fmt: skip
        made._compute, made._form, made._latest, made._views = compute, form, latest, views
        made._whole, made._serial = (form, next(_SERIALS)) if base is None else (base._whole, base._serial)
        return made

    def __init__(self, *given: Any) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        first: Any = args[0] if args else None
        if func in SHARING:
            return first._with((), first._form)
        if isinstance(first, OnDemand) and is_view(func):
            own: View = lambda tensor: func(tensor, *args[1:], **(kwargs or {}))  # noqa: E731
            return first._with((own,), own(first._form))
        plain = pytree.tree_map_only(OnDemand, OnDemand.values_now, (args, dict(kwargs or {})))
        return func(*plain[0], **plain[1])

    def _with(self, views: tuple[View, ...], form: Tensor) -> OnDemand:
        return OnDemand(self._compute, form, self.device, self._latest, (*self._views, *views), self)

    def values_now(self) -> Tensor:
        """The values, a plain tensor that is not to be written to."""
        found = self._latest.of(self._compute, self._compute, self._whole, self.device)
        for view in self._views:
            found = view(found)
        return found

    def numpy(self, *, force: bool = False) -> Any:
        """As of a tensor."""
        return self.values_now().numpy(force=force)

    def __array__(self, dtype: Any = None) -> Any:
        return self.values_now().__array__(dtype)

    def tolist(self) -> Any:
        """As of a tensor."""
        return self.values_now().tolist()

    def data_ptr(self) -> int:
        """Another one for tensors that are computed by other functions; no address."""
        return -(self._serial << 44) + int(self.storage_offset()) * self.itemsize

    def untyped_storage(self) -> torch.UntypedStorage:
        """That of the values, the same for views as long as no others are asked for."""
        return self.values_now().untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            values = self.values_now().clone()
            is_parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = nn.Parameter(values, self.requires_grad) if is_parameter else values
        found: Tensor = memo[id(self)]
        return found

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"OnDemand({tuple(self.shape)}, {self.dtype})"


def masked_on_demand(values: Tensor, mask: Callable[[], Tensor], latest: Latest) -> Tensor:
    """A parameter times its mask, computed whenever it is read; at once where that is small.

    Args:
        values: of the parameter, detached. mask: gives the mask, on the same device.
        latest: shared between those that are read in turns.
    """
    if values.nbytes < LEAST or type(values) is not Tensor:
        return mask() * values
    form = torch.empty_like(values, device="meta")
    return OnDemand(lambda out: torch.mul(mask(), values, out=out), form, values.device, latest)


def own_tensors(final: nn.Module, traced: nn.Module) -> None:
    """Copy what a module still shares with another one, or computes; what is tied, or overlaps, is so in the copy."""
    shared = {id(tensor) for tensor in tensors_of(traced).values()}
    memo: dict[int, Any] = {}
    for module in final.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if id(tensor) in shared or isinstance(tensor, OnDemand):
                    held[name] = copy.deepcopy(tensor, memo)  # type: ignore[assignment]
