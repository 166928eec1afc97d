"""Which node an error happened at: noted by those who work node by node, told by those who report the error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import fx

from fxprune.graph.text import describe

_SITE = "__fxprune_site__"


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
        vars(error).setdefault(_SITE, describe(node))
        raise


def site_of(error: Exception) -> str | None:
    """The node that was worked on when `error` was raised, as error messages name it; None where none was noted."""
    found: str | None = vars(error).get(_SITE)
    return found
