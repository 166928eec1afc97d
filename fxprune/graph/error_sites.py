"""Which node an error happened at: noted by those who work node by node, told by those who report the error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from torch import fx

from fxprune.graph.text import describe

_SITE, _STEP = "__fxprune_site__", "__fxprune_step__"


@contextlib.contextmanager
def working_on(node: fx.Node) -> Iterator[None]:
    """An error that leaves the block happened at `node`, unless a block further in has named its own node.

    Example:
        >>> for node in list(graph.nodes):
        ...     with working_on(node):
        ...         rewrite(node)
    """
    try:
        yield
    except Exception as error:
        vars(error).setdefault(_SITE, node)
        raise


_visited: ContextVar[fx.Node | None] = ContextVar("the node that a loop over a graph is at", default=None)


def visit(graph: fx.Graph) -> Iterator[fx.Node]:
    """The nodes of a graph, as they were at first; an error in the loop over them happened at the node it is at.

    An error after the loop was left early would name its last node: leave it by its end, or use `working_on`.

    Example:
        >>> for node in visit(graph):
        ...     rewrite(node)
    """
    for node in list(graph.nodes):
        _visited.set(node)
        yield node
    _visited.set(None)


def forget_visits() -> None:
    """No loop over a graph is under way."""
    _visited.set(None)


def site_of(error: Exception) -> str | None:
    """The node that was worked on when `error` was raised, as error messages name it; None where none was noted."""
    node = node_of(error)
    return None if node is None else describe(node)


def node_of(error: BaseException) -> fx.Node | None:
    """The node that was worked on when `error` was raised; None where none was noted."""
    found: fx.Node | None = vars(error).get(_SITE)
    return _visited.get() if found is None else found


def failed_in(error: BaseException, step: str, node: fx.Node | None) -> None:
    """Note in which pass an error happened, at which node."""
    vars(error).update({_STEP: step, _SITE: node})


def step_of(error: BaseException) -> str | None:
    """The name of the pass in which `error` happened."""
    found: str | None = vars(error).get(_STEP)
    return found
