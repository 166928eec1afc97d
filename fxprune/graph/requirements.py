"""What calls require of the module that they are given."""

from __future__ import annotations

from typing import Any

from fxprune.errors import ArgumentTypeError, FinalizeError, FxpruneError
from fxprune.graph.traced import TracedModule


def require_traced(value: Any) -> None:
    """Raise ArgumentTypeError unless the value is a traced module."""
    if not isinstance(value, TracedModule):
        raise ArgumentTypeError(f"a traced module is needed, got {type(value).__name__}. Call fxprune.trace first.")


def require_eval(traced: Any, what: str, error: type[FxpruneError] = FinalizeError) -> None:
    """Raise unless a value is a traced module with an eval graph.

    Args:
        traced: the value.
        what: what needs the graph, as the message begins: "finalize".
        error: the class to raise where the graph is missing; ArgumentTypeError where the value is no traced module.
    """
    require_traced(traced)
    if "eval" not in traced.modes:
        raise error(
            f"{what} needs the eval graph; captured: {', '.join(traced.modes)}. Trace the model with "
            'modes=("train", "eval").'
        )
