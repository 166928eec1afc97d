"""What a class says sizes with: the attributes and the shapes that the integers in its calls were computed from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxprune.graph.arguments import Arguments

# an attribute (path of the module, name, entry), a size (number of the tensor, axis), or an operation on such
Origin = tuple[Any, ...]
_SHAPES = (Tensor.shape.__get__, Tensor.size)  # type: ignore[attr-defined]
_VIEWS = ("view", "reshape", "expand")
_PARTS = ("split", "split_with_sizes")


class Said(int):
    """An integer that knows what it was computed from."""

    origin: Origin

    def __new__(cls, value: int, origin: Origin) -> Said:
        said = super().__new__(cls, value)
        said.origin = origin
        return said

    def __add__(self, other: int) -> Said:
        return self._with("+", int(self) + int(other), other)

    def __sub__(self, other: int) -> Said:
        return self._with("-", int(self) - int(other), other)

    def __mul__(self, other: Any) -> Any:
        return self._with("*", int(self) * int(other), other) if isinstance(other, int) else int(self) * other

    def __floordiv__(self, other: int) -> Said:
        return self._with("//", int(self) // int(other), other)

    __radd__, __rmul__ = __add__, __mul__

    def __deepcopy__(self, memo: dict[int, Any]) -> Said:
        return self

    def __reduce__(self) -> Any:
        return int, (int(self),)

    def _with(self, operation: str, value: int, other: int) -> Said:
        return Said(value, (operation, self.origin, getattr(other, "origin", int(other))))


@dataclass(frozen=True)
class SaidSize:
    """One axis of a tensor whose size a class said.

    Attributes:
        tensor: its value. axis: which. origin: what the size was computed from.
    """

    tensor: Tensor
    axis: int
    origin: Origin


@dataclass
class SaidSizes:
    """The axes whose sizes a class says in one run.

    Attributes:
        axes: of results of views and of parts that are split off.
        tensors: by number, those whose shapes were read and said again.
    """

    axes: list[SaidSize] = field(default_factory=list)
    tensors: dict[int, Tensor] = field(default_factory=dict)


class _Watch(TorchFunctionMode):
    """Notes which sizes are said, and has shapes tell where they come from."""

    def __init__(self) -> None:
        super().__init__()
        self.found, self._read = SaidSizes(), dict[int, Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _SHAPES:
            return self._telling(args[0], result, args[1:])
        name = getattr(func, "__name__", "")
        if name in _VIEWS and isinstance(result, Tensor):
            sizes = _flat(args[1:])
            if len(sizes) == result.dim():
                self._note((result, axis, size) for axis, size in enumerate(sizes))
        elif name == "unflatten" and len(args) == 3:
            first = args[1] % args[0].dim()
            self._note((result, first + at, size) for at, size in enumerate(args[2]))
        elif name in _PARTS and len(args) > 1 and isinstance(args[1], list | tuple):
            axis = (kwargs or {}).get("dim", args[2] if len(args) > 2 else 0)
            self._note((part, axis % part.dim(), size) for part, size in zip(result, args[1], strict=True))
        return result

    def _telling(self, tensor: Tensor, result: Any, axes: tuple[Any, ...]) -> Any:
        number = id(tensor)
        self._read[number] = tensor
        if type(result) is int:
            return Said(result, ("size", number, axes[0] % tensor.dim())) if axes else result
        return torch.Size(Said(size, ("size", number, axis)) for axis, size in enumerate(result))

    def _note(self, axes: Iterator[tuple[Tensor, int, Any]]) -> None:
        for tensor, axis, size in axes:
            if not isinstance(size, Said):
                continue
            self.found.axes.append(SaidSize(tensor, axis, size.origin))
            if size.origin[0] == "size":
                self.found.tensors[size.origin[1]] = self._read[size.origin[1]]


def _flat(values: tuple[Any, ...]) -> list[Any]:
    return [each for value in values for each in (value if isinstance(value, list | tuple) else [value])]


def said_sizes(model: nn.Module, inputs: Arguments) -> SaidSizes:
    """What a model says sizes with in one call; nothing where its code does not run with integers that know.

    Args:
        model: in the mode that counts; stays as it is. inputs: of the call.
    """
    watch = _Watch()
    args, kwargs = copy.deepcopy(inputs)
    with _said_attributes(model), torch.no_grad(), watch:
        try:
            model(*args, **kwargs)
        except Exception:  # the user's code may raise anything
            return SaidSizes()
    return watch.found


@contextmanager
def _said_attributes(model: nn.Module) -> Iterator[None]:
    """Have the integers of modules say that they are these, inside the block; those of torch's layers do not."""
    restore: list[Callable[[], None]] = []
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn."):
            continue
        own = vars(module)
        for name, value in list(own.items()):
            said = _said(value, path, name)
            if said is not value:
                own[name] = said
                restore.append(lambda own=own, name=name, value=value: own.__setitem__(name, value))  # type: ignore[misc]
    try:
        yield
    finally:
        for undo in restore:
            undo()


def _said(value: Any, path: str, name: str) -> Any:
    if name.startswith("_") or name == "training":
        return value
    if type(value) is int:
        return Said(value, ("attribute", path, name, None))
    if type(value) in (tuple, list):
        return type(value)(
            Said(entry, ("attribute", path, name, i)) if type(entry) is int else entry for i, entry in enumerate(value)
        )
    return value
