"""The contract of a pass, and the pipeline that runs passes."""

from __future__ import annotations

import abc
import copy
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.errors import FxpruneError, PassError
from fxprune.graph.error_sites import failed_in, forget_visits, node_of, site_of
from fxprune.graph.traced import TracedModule


@dataclass(frozen=True)
class Pass(abc.ABC):
    """A rewrite of every graph of a traced module; the fields of a subclass are its options.

    A subclass sets `name` (kebab-case) and implements `run`; one that is not `in_place` is run on a copy. `requires`
    and `ensures` state what must hold of the module before and of the result after; they raise `FxpruneError`. Work on
    a node stands inside `working_on(node)`, or in a loop over `visit(graph)`, so that an error names it.
    """

    name: ClassVar[str]
    in_place: ClassVar[bool] = True

    @abc.abstractmethod
    def run(self, traced: TracedModule) -> bool:
        """Rewrite the graphs of `traced`; returns whether anything changed."""

    def written(self, traced: TracedModule) -> Collection[torch.Tensor]:
        """The parameters whose values it writes into, where it is asked for these by their names."""
        return ()

    def requires(self, traced: TracedModule) -> None:
        """Raise unless the pass may run."""

    def ensures(self, traced: TracedModule) -> None:
        """Raise unless the pass did its work."""

    def __call__(self, traced: TracedModule) -> PassResult:
        """A pipeline of this pass alone; see `run_passes`."""
        return run_passes(traced, (self,))

    def origin(self, parameter: str) -> dict[str, str]:
        """The provenance that inserted nodes carry, for `tag`."""
        return {"pass": self.name, "parameter": parameter}


Callback = Callable[[Pass, TracedModule, bool, float], None]


def run_passes(traced: TracedModule, pipeline: Sequence[Pass], after: Callback | None = None) -> PassResult:
    """Run a pipeline in order.

    Args:
        traced: the module; passes work in place unless they say otherwise.
        pipeline: the passes.
        after: called after each pass with the pass, the module, whether it was modified, and the seconds it took:
            the one place for checks, printing and timing.

    Returns:
        torch's `PassResult`, with the module that the last pass gave; `modified` is whether any pass changed anything.

    Raises:
        FxpruneError: as the pass raised it, with a note that names the pass, those before it and the node.
        PassError: any other error inside a pass, so named. What the passes before it did to `traced` stays.

    Example:
        >>> run_passes(traced, (InsertMask("0.weight", mask), EliminateDeadCode())).modified
        True
    """
    modified = False
    for i, step in enumerate(pipeline):
        start = time.perf_counter()
        forget_visits()
        try:
            with torch.inference_mode(False):  # tensors of that mode could not be trained
                traced, changed = _apply(step, traced, settles=after is not None)
        except Exception as error:
            if modified:  # the module that was given runs as the passes before left it
                traced.recompile()
            where = _place(error, step, pipeline[:i])
            failed_in(error, step.name, node_of(error))
            if isinstance(error, FxpruneError):
                error.add_note(where)
                raise
            failure = PassError(f"{where}: {type(error).__name__}: {error}")
            failed_in(failure, step.name, node_of(error))
            raise failure from error
        modified |= changed
        if after is not None:
            after(step, traced, changed, time.perf_counter() - start)
    if modified and after is None:  # once for all passes: code costs more to generate than most passes
        _settle(traced)
    return PassResult(traced, modified)


def _apply(step: Pass, traced: TracedModule, *, settles: bool) -> tuple[TracedModule, bool]:
    """Run one pass with its checks; `settles`: its result is ready to be called."""
    step.requires(traced)
    result = traced if step.in_place else copy.deepcopy(traced)
    modified = step.run(result)
    step.ensures(result)
    if modified and settles:
        _settle(result)
    return result, modified


def _settle(traced: TracedModule) -> None:
    """Check the graphs and generate their code."""
    for graph in traced.graphs.values():
        graph.lint()
    traced.recompile()


def _place(error: Exception, step: Pass, before: Sequence[Pass]) -> str:
    names = ", ".join(earlier.name for earlier in before) or "none"
    node = site_of(error)
    return f"in pass {step.name!r} (before it: {names})" + (f", at node {node}" if node else "")
