"""Why a channel stays: what pins it, who reads it, or what the others ask of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from torch import fx

from fxprune.graph.text import describe


@dataclass(frozen=True)
class Pinned:
    """Something takes the channel as it is, whatever its weights are."""

    reason: Callable[[], str]

    def text(self) -> str:
        return f"pinned by {self.reason()}"


@dataclass(frozen=True)
class ReadBy:
    """A contraction has weights on it that are not zero, and what it reads there depends on the input."""

    node: fx.Node

    def text(self) -> str:
        return f"{describe(self.node)} reads it, and it is not constant there"


class Structural(Enum):
    """Nothing needs the channel for itself; without it what is left would not be whole."""

    GRID = "part of a grid whose other channels stay"
    REPRESENTATIVE = "represents the constants that a zero-padding layer reads"
    BALANCED = "kept so that the groups of a convolution stay equal"
    NONEMPTY = "the last one of its axis"
    ALIGNED = "kept for a count that runs faster"

    def text(self) -> str:
        return self.value


Reason: TypeAlias = Pinned | ReadBy | Structural
