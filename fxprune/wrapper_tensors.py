"""Tensors whose values are elsewhere, plain ones to every operator and to whatever reads them in other ways."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from fxprune.torch_internals import untouched_by_torch_function

aten = torch.ops.aten
View = Callable[[Tensor], Tensor]

SERIALS = itertools.count(1)  # of values that share no memory
_SHARING = {aten.detach.default, aten.alias.default}


class WrapperTensor(Tensor):
    """A tensor without values of its own. Views of it are as it is: they are taken anew of the values.

    It is a wrapper subclass, as torch calls that. One that can be used says where the values are, by `whole`.
    """

    _form: Tensor  # on the device "meta"
    _views: tuple[View, ...]  # of what holds the values, one after the other
    __torch_function__ = untouched_by_torch_function  # type: ignore[assignment]

    @classmethod
    def _wrapped(cls, form: Tensor, device: torch.device, views: tuple[View, ...]) -> Self:
        made: Self = Tensor._make_wrapper_subclass(
            cls, form.shape, strides=form.stride(), storage_offset=form.storage_offset(), dtype=form.dtype,
            device=device,
        )  # fmt: skip
        made._form, made._views = form, views
        return made

    def __init__(self, *given: Any) -> None:
        super().__init__()

    @abstractmethod
    def whole(self) -> Tensor:
        """All values, a plain tensor."""

    @property
    @abstractmethod
    def _serial(self) -> int:
        """The same for what shares memory."""

    @abstractmethod
    def _viewed(self, views: tuple[View, ...], form: Tensor) -> Self:
        """One of the same values, by other views."""

    @classmethod
    @abstractmethod
    def _result(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operator gives that is no view."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        first: Any = args[0] if args else None
        if func in _SHARING:
            return first._viewed(first._views, first._form)
        if isinstance(first, WrapperTensor) and _is_view(func):
            own: View = lambda tensor: func(tensor, *args[1:], **(kwargs or {}))  # noqa: E731
            return first._viewed((*first._views, own), own(first._form))
        return cls._result(func, args, dict(kwargs or {}))

    def _taken_of(self, values: Tensor) -> Tensor:
        """What the views make of what holds the values."""
        for view in self._views:
            values = view(values)
        return values

    def numpy(self, *, force: bool = False) -> Any:
        """As of a tensor."""
        return self.whole().numpy(force=force)

    def __array__(self, dtype: Any = None) -> Any:
        return self.whole().__array__(dtype)

    def tolist(self) -> Any:
        """As of a tensor."""
        return self.whole().tolist()

    def data_ptr(self) -> int:
        """Another one for tensors that share no memory; no address."""
        return -(self._serial << 44) + int(self.storage_offset()) * self.itemsize

    def untyped_storage(self) -> torch.UntypedStorage:
        """That of the whole."""
        return self.whole().untyped_storage()

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = self.whole()
        return (nn.Parameter(plain, self.requires_grad) if isinstance(self, nn.Parameter) else plain
                ).__reduce_ex__(protocol)  # fmt: skip

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({tuple(self.shape)}, {self.dtype})"


def _is_view(func: Any) -> bool:
    """Whether an operator gives one tensor that shares the memory of its first argument, and writes to none."""
    results, given = func._schema.returns, func._schema.arguments
    shares = len(results) == 1 and isinstance(results[0].type, torch.TensorType) and results[0].alias_info is not None
    return shares and not any(each.alias_info is not None and each.alias_info.is_write for each in given)
