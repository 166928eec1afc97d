"""Where in a model's code something happened."""

from __future__ import annotations

import linecache
import os
import sys
import traceback
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

_TORCH = os.path.join(os.path.dirname(os.path.abspath(torch.__file__)), "")


@dataclass(frozen=True)
class Place:
    """A line that a module of the model was running.

    Attributes:
        module: its path, or "the root module".
        kind: its class.
        file, line: where.
    """

    module: str
    kind: str
    file: str
    line: int

    @property
    def source(self) -> str:
        """The text of the line, empty where the file is not known."""
        return linecache.getline(self.file, self.line).strip()

    @property
    def quoted(self) -> str:
        """The place with the text of its line."""
        return f"{self}: `{self.source}`" if self.source else str(self)

    def __str__(self) -> str:
        return f"{self.module} ({self.kind}), {self.file}:{self.line}"


def module_names(model: nn.Module) -> Mapping[int, str]:
    """The paths of a model's modules by their identity."""
    return {id(module): name for name, module in model.named_modules()}


def place_of_error(error: BaseException, model: nn.Module) -> Place | None:
    """The innermost module of the model, and its line, that an error passed through; None where it is not known."""
    places = _places(traceback.walk_tb(error.__traceback__), module_names(model))
    return next(iter(reversed([*places])), None)


def place_now(names: Mapping[int, str]) -> Place | None:
    """The innermost line of the model's own code that runs now, one of torch's where it has none; None outside of it.

    Args:
        names: as `module_names` gives them.
    """
    found = [*_places(traceback.walk_stack(sys._getframe()), names)]
    return next((place for place in found if not place.file.startswith(_TORCH)), found[0] if found else None)


def _places(frames: Iterable[tuple[types.FrameType, int]], names: Mapping[int, str]) -> Iterator[Place]:
    for frame, line in frames:
        code, owner = frame.f_code, _owner(frame)
        if id(owner) in names and code.co_name != "_call_impl" and not code.co_name.startswith("_wrapped"):
            name = names[id(owner)] or "the root module"
            yield Place(name, type(owner).__name__, code.co_filename, line)


def _owner(frame: types.FrameType) -> object:
    """The object whose method a frame runs, None where it runs none that is known as such."""
    code = frame.f_code
    if not code.co_argcount:
        return None
    name = code.co_varnames[0]
    owner = frame.f_locals.get(name)
    is_method = name == "self" or getattr(getattr(type(owner), code.co_name, None), "__code__", None) is code
    return owner if is_method else None
