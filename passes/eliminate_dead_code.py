"""Erase nodes without users and without effect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxprune.graph.editing import erase_dead
from fxprune.graph.traced import TracedModule

from .base import Pass


@dataclass(frozen=True)
class EliminateDeadCode(Pass):
    """Erase what no output depends on; nodes that write a tensor or draw random numbers stay.

    Example:
        >>> EliminateDeadCode()(traced).modified
        False
    """

    name: ClassVar[str] = "eliminate-dead-code"

    def run(self, traced: TracedModule) -> bool:
        return any([erase_dead(graph) for graph in traced.graphs.values()])
