"""How far a long work is, on a terminal."""

from __future__ import annotations

import sys
from types import TracebackType

_WIDTH = 60


class Progress:
    """One line on a terminal's standard error, gone at the end; nothing where it is no terminal.

    Args:
        what: what is done. total: how many steps there are.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total = what, total
        self._done = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write(" " * _WIDTH + "\r")

    def show(self, name: str) -> None:
        """What is worked on."""
        self._write(f"{self._what} {self._done}/{self._total} {name}"[:_WIDTH].ljust(_WIDTH))

    def advance(self, count: int) -> None:
        """So many steps are done."""
        self._done += count

    def _write(self, text: str) -> None:
        if sys.stderr is not None and sys.stderr.isatty():
            sys.stderr.write(f"\r{text}")
            sys.stderr.flush()
