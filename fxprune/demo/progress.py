"""Showing how far a run is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import TaskID

from fxprune import progress as shown

Step = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is


@contextlib.contextmanager
def progress(console: Console, quiet: bool) -> Iterator[Step]:
    """A `step` for `run` that shows bars on a terminal, plain lines elsewhere, and nothing if `quiet`."""
    tasks: dict[str, TaskID] = {}
    with shown.quiet(quiet), shown.bars(console, patience=0.0) as bars:

        def step(text: str, done: int, total: int) -> None:
            if bars is not None:
                if text not in tasks:
                    tasks[text] = bars.add_task(text, total=total)
                bars.update(tasks[text], completed=done)
            quarter = -(-total // 4)
            if bars is None and not quiet and (done == total or (done > 0 and done % quarter == 0)):
                console.print(f"{text} {done}/{total}", highlight=False)

        yield step
