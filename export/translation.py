"""torch's translation of a graph, with errors that say what was to be written."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from torch import fx

from fxprune.errors import ExportError

from .quiet import quiet

_COLOR = re.compile(r"\x1b\[\d+m")


@contextlib.contextmanager
def translating(task: str) -> Iterator[None]:
    """Raise whatever torch, onnxscript or an operator's translation raises as an ExportError; `quiet` meanwhile."""
    try:
        with quiet(), fx.traceback.preserve_node_meta():
            yield
    except OSError:
        raise
    except Exception as error:
        chain = _chain(error)
        told = "; ".join(chain[1:] or chain)  # the first of several only says where to report
        raise ExportError(f"torch cannot {task}: {told}") from error


def _chain(error: Exception) -> list[str]:
    """An error and its causes, each as a line of plain text."""
    chain: list[str] = []
    cause: BaseException | None = error
    while cause:
        chain.append(_COLOR.sub("", f"{type(cause).__name__}: {cause}"))
        cause = cause.__cause__
    return chain
