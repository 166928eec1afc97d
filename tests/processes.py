"""Running a function in several processes of one process group, as torchrun does."""

from __future__ import annotations

import contextlib
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
METHOD = "forkserver"  # of starting processes: what they all import is imported once
multiprocessing.set_forkserver_preload(["fxprune", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"])


def in_processes(count: int, function: Callable[..., Any], *args: Any, seconds: float = SECONDS) -> list[Any]:
    """What each process returned; a process that raises fails the test with its traceback.

    Args:
        count: of processes, each with one thread, in a group of gloo.
        function: of a module, called with `args` in every process.
        seconds: the time-out of the group.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(_process, (count, folder, function, args, seconds), count, start_method=METHOD)
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(count)]


def survivors(count: int, lost: int, function: Callable[..., Any], *args: Any, seconds: float = SECONDS) -> list[Any]:
    """What the processes returned of which one, `lost`, ends before it is done, by `os._exit` or a signal.

    Raises:
        AssertionError: another one did not return, or that one did.
    """
    context = multiprocessing.get_context(METHOD)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (count, folder, function, args, seconds)
        started = [context.Process(target=_process, args=(rank, *arguments)) for rank in range(count)]
        for process in started:
            process.start()
        for process in started:
            process.join(2 * SECONDS)
            process.kill()
        files = [Path(folder, f"{rank}.pt") for rank in range(count)]
        assert [file.exists() for file in files] == [rank != lost for rank in range(count)]
        return [torch.load(file, weights_only=False) for file in files if file.exists()]


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
            with contextlib.suppress(RuntimeError):  # where another process is gone
                dist.destroy_process_group()
