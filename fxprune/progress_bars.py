"""The lines of works on a terminal, by rich."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Bars(Progress):
    """The lines of all works at hand, gone when the outermost ends; rich's, in which lines wait to be shown."""

    def __init__(self, console: Console, patience: float) -> None:
        self._patience = patience
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(20),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        super().__init__(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)

    def get_renderables(self) -> Iterable[RenderableType]:
        """A table of the works that have taken long enough."""
        yield self.make_tasks_table([task for task in self.tasks if self._is_long(task)])

    def _is_long(self, task: Task) -> bool:
        return (task.elapsed or 0.0) >= self._patience


def on_terminal(console: Console | None, patience: float) -> Bars:
    """New lines on a console, standard error by default, each from so many seconds on."""
    return Bars(console or Console(stderr=True), patience)
