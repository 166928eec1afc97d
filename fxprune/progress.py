"""How far a long work is, on a terminal.

Works nest: a budget that is chosen by repair shows a line for the choice and one for the repair. Nothing is written
before a work has taken two seconds, and nothing ever where standard error is no terminal.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from fxprune.progress_bars import Bars

PATIENCE = 2.0  # seconds

Called = TypeVar("Called", bound=Callable[..., object])
_WORK = "__work__"


_BARS: ContextVar[Bars | None] = ContextVar("bars", default=None)
_IS_QUIET: ContextVar[bool] = ContextVar("quiet", default=False)


class Work:
    """One work; all that it is told is lost where nothing is shown."""

    def __init__(self, what: str, bars: Bars | None, task: TaskID | None) -> None:
        self._what, self._bars, self._task = what, bars, task

    def show(self, name: str) -> None:
        """What is worked on."""
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, description=f"{self._what} {name}")

    def advance(self, count: int) -> None:
        """So many steps are done."""
        if self._bars is not None and self._task is not None:
            self._bars.advance(self._task, count)


@contextlib.contextmanager
def working(what: str, total: int | None = None) -> Iterator[Work]:
    """Show on a terminal's standard error that something is worked on, how far it is, and how long it takes.

    Args:
        what: what is done. total: how many steps there are, None where that is not known.

    Example:
        >>> with working("sensitivity", total=2) as work:
        ...     for name in ("conv1", "conv2"):
        ...         work.show(name)
        ...         work.advance(1)
    """
    with bars() as shared:
        if shared is None:
            yield Work(what, None, None)
            return
        task = shared.add_task(what, total=total)
        try:
            yield Work(what, shared, task)
        finally:
            shared.remove_task(task)


@contextlib.contextmanager
def bars(console: Console | None = None, patience: float = PATIENCE) -> Iterator[Bars | None]:
    """The lines that all works inside are shown on; those of an outer call where there is one, None without a terminal.

    Args:
        console: what to write on, standard error by default. patience: seconds before a work is shown.
    """
    shared = None if _IS_QUIET.get() else _BARS.get()
    if shared is not None or _IS_QUIET.get() or not _is_terminal(console):
        yield shared
        return
    from fxprune.progress_bars import on_terminal  # rich would add to the time of every import of fxprune

    shared = on_terminal(console, patience)
    token = _BARS.set(shared)
    start = threading.Timer(patience, shared.start)
    start.daemon = True
    start.start()
    try:
        yield shared
    finally:
        start.cancel()
        start.join()
        shared.stop()
        _BARS.reset(token)


@contextlib.contextmanager
def quiet(is_quiet: bool = True) -> Iterator[None]:
    """Show nothing of the works inside."""
    token = _IS_QUIET.set(is_quiet)
    try:
        yield
    finally:
        _IS_QUIET.reset(token)


def shown(what: str) -> Callable[[Called], Called]:
    """A decorator below those of `fxprune.calling`: each call is a work of that name.

    It only marks the function: a call of its own would stand between the function and the line that its warnings name.
    """

    def decorate(function: Called) -> Called:
        function.__dict__[_WORK] = what
        return function

    return decorate


def take_work(function: Callable[..., object]) -> str | None:
    """The name that `shown` marked a function with, which whoever asks is to show."""
    work: str | None = function.__dict__.pop(_WORK, None)
    return work


def _is_terminal(console: Console | None) -> bool:
    if console is not None:
        return console.is_terminal
    return sys.stderr is not None and sys.stderr.isatty()
