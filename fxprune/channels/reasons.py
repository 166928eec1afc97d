"""Why a channel stays: what pins it, who reads it, or what the others ask of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from torch import fx

from fxprune.channels.readers import READ
from fxprune.graph.text import describe

# where outputs ask for a channel that nothing needs themselves, and stay for another reason
FOR_DEAD = "; what it computes from it is dead too, and stays for a reason of its own"
# where what asks gives the same for every input, though not in numbers that could take its place
FOR_FIXED = "; what it gives is the same for every input, which is not followed further"


@dataclass(frozen=True)
class Pinned:
    """Something takes the channel as it is, whatever its weights are."""

    reason: Callable[[], str]

    def text(self) -> str:
        return f"pinned by {self.reason()}"


@dataclass(frozen=True)
class ReadBy:
    """A contraction has weights on it that are not zero, or statistics are taken over it."""

    node: fx.Node
    why: str = READ

    def text(self) -> str:
        return f"{describe(self.node)} {self.why}"


class Structural(Enum):
    """Nothing needs the channel for itself; without it what is left would not be whole."""

    GRID = "part of a grid whose other channels stay"
    REPRESENTATIVE = "represents the constants that a zero-padding layer reads"
    BALANCED = "kept so that groups of channels stay equal"
    SAME_UNITS = "kept so that the layers and directions of a recurrent call have equally many units"
    MORE_CELLS = "kept so that a recurrent layer has more cells than projected units"
    NONEMPTY = "the last one of its axis"
    ALIGNED = "kept for a count that runs faster"

    def text(self) -> str:
        return self.value


Reason: TypeAlias = Pinned | ReadBy | Structural
