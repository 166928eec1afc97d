"""The contract of a pass, and the pipeline that runs passes."""

from __future__ import annotations

import abc
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import ClassVar

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.errors import FxpruneError, PassError
from fxprune.graph import describe
from fxprune.traced import TracedModule

_current: ContextVar[fx.Node | None] = ContextVar("current node", default=None)


@dataclass(frozen=True)
class Pass(abc.ABC):
    """A rewrite of every graph of a traced module; the fields of a subclass are its options.

    A subclass sets `name` (kebab-case) and `in_place`, and implements `run`. `requires` and `ensures` state what must
    hold before and after; they raise `FxpruneError`.
    """

    name: ClassVar[str]
    in_place: ClassVar[bool] = True

    @abc.abstractmethod
    def run(self, traced: TracedModule) -> bool:
        """Rewrite the graphs of `traced`; returns whether anything changed."""

    def requires(self, traced: TracedModule) -> None:
        """Raise unless the pass may run."""

    def ensures(self, traced: TracedModule) -> None:
        """Raise unless the pass did its work."""

    def __call__(self, traced: TracedModule) -> PassResult:
        """Run the pass; returns torch's `PassResult` with the module and whether it was modified."""
        self.requires(traced)
        modified = self.run(traced)
        self.ensures(traced)
        if modified:
            for graph in traced.graphs.values():
                graph.lint()
            traced.recompile()
        return PassResult(traced, modified)

    def origin(self, parameter: str) -> dict[str, str]:
        """The provenance that inserted nodes carry in `meta["fxprune"]`."""
        return {"pass": self.name, "parameter": parameter}


def visit(graph: fx.Graph) -> Iterator[fx.Node]:
    """The nodes of `graph`, noting the current one, so that an error in a pass can name it."""
    for node in list(graph.nodes):
        token = _current.set(node)
        yield node
        _current.reset(token)


Callback = Callable[[Pass, TracedModule, bool, float], None]


def run_passes(traced: TracedModule, pipeline: tuple[Pass, ...], after: Callback | None = None) -> PassResult:
    """Run a pipeline in order.

    Args:
        traced: the module; passes work in place where they say so.
        pipeline: the passes.
        after: called after each pass with the pass, the module, whether it was modified, and the seconds it took:
            the one place for checks, printing and timing.

    Returns:
        torch's `PassResult`; `modified` is whether any pass changed anything.

    Raises:
        FxpruneError: as the pass raised it, with a note that names the pass and those before it.
        PassError: any other error inside a pass.

    Example:
        >>> run_passes(traced, (InsertMask("0.weight", mask), EliminateDeadCode())).modified
        True
    """
    modified = False
    for i, step in enumerate(pipeline):
        _current.set(None)
        start = time.perf_counter()
        try:
            result = step(traced)
        except Exception as error:
            node = _current.get()
            before = ", ".join(p.name for p in pipeline[:i]) or "none"
            where = f"in pass {step.name!r} (before it: {before}){f', at node {describe(node)}' if node else ''}"
            if isinstance(error, FxpruneError):
                error.add_note(where)
                raise
            raise PassError(f"{where}: {type(error).__name__}: {error}") from error
        traced, modified = result.graph_module, modified or result.modified
        if after:
            after(step, traced, result.modified, time.perf_counter() - start)
    return PassResult(traced, modified)
