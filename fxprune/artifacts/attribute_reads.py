"""Which attributes of its modules a model's forward reads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch import nn

Reads = set[tuple[nn.Module, str]]
_patched = threading.Lock()


@contextlib.contextmanager
def recorded_reads(root: nn.Module) -> Iterator[Reads]:
    """Record the integers, tuples and lists that are read from the modules of `root` inside the block.

    `nn.Module` itself is patched meanwhile, which every thread of the process sees: their modules work as before, more
    slowly, and are not recorded. A second block waits for the first to end; it must not stand inside it.
    """
    modules, reads = set(root.modules()), Reads()

    def read(module: nn.Module, name: str) -> Any:
        value = object.__getattribute__(module, name)
        if type(value) in (int, tuple, list) and module in modules:
            reads.add((module, name))
        return value

    with _patched:
        nn.Module.__getattribute__ = read  # type: ignore[method-assign, assignment]
        try:
            yield reads
        finally:
            del nn.Module.__getattribute__
