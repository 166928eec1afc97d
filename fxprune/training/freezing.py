"""Batch norms that keep their statistics while the rest trains."""

from __future__ import annotations

from collections.abc import Iterable

from fxprune.errors import ArgumentTypeError, NameLookupError
from fxprune.graph.names import match_names
from fxprune.graph.requirements import require_traced
from fxprune.graph.switching import batch_norms
from fxprune.graph.traced import TracedModule


def freeze_batch_norms(traced: TracedModule, names: str | Iterable[str] | None = None) -> TracedModule:
    """Let batch norms use their running statistics in train mode too, and leave these as they are.

    In eager this is the loop `if isinstance(module, nn.BatchNorm2d): module.eval()`; the modules below a traced one are
    of no such class. Each is switched as by its own `eval()`: it stays so until its own `train()`, through
    `traced.train()` and `eval()`, copies, `finalize`, `save` and `load`. Gains and shifts go on training unless
    `requires_grad_(False)` says else.

    Args:
        traced: the module, changed in place; nothing is to be done where it has no train graph.
        names: paths of batch norms, or patterns of such with * ? [seq]; None: all.

    Returns:
        `traced`.

    Raises:
        NameLookupError: a pattern matches no batch norm with running statistics, or there is none.

    Example:
        >>> fxprune.freeze_batch_norms(traced, "backbone.*")
        >>> traced.get_submodule("backbone.bn1").train()  # one of them trains again
    """
    require_traced(traced)
    there = list(dict.fromkeys(path for graph in traced.graphs.values() for path in batch_norms(graph)))
    if not there:
        raise NameLookupError("batch norms were to be frozen; the traced module has none with running statistics.")
    if not isinstance(names, str | Iterable | None):
        raise ArgumentTypeError(f"names is a {type(names).__name__}; paths of batch norms, or patterns, are needed.")
    patterns = [names] if isinstance(names, str) else ["*"] if names is None else list(names)
    for path in dict.fromkeys(path for pattern in patterns for path in match_names(there, pattern, "batch norm")):
        traced.switch(traced.get_submodule(path), False)
    return traced
