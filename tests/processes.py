"""Running a function in several processes of one process group, as torchrun does."""

from __future__ import annotations

import datetime
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

SECONDS = 120  # longer than any test, shorter than a suite that hangs


def in_processes(count: int, function: Callable[..., Any], *args: Any, seconds: float = SECONDS) -> list[Any]:
    """What each process returned; a process that raises fails the test with its traceback.

    Args:
        count: of processes, each with one thread, in a group of gloo.
        function: of a module, called with `args` in every process.
        seconds: the time-out of the group.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_process, (count, folder, function, args, seconds), nprocs=count)
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(count)]


def _process(
    rank: int, count: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...], seconds: float
) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    timeout = datetime.timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=count, timeout=timeout)
    try:
        torch.save(function(*args), Path(folder, f"{rank}.pt"))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
