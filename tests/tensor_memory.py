"""Memory, counted apart from what is tested: of all storages that are alive behind an operator, and of the process."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

_MMAP_THRESHOLD = -3  # of mallopt, in glibc's malloc.h


class TensorMemory(TorchDispatchMode):
    """Counts what operators allocate within, beside the tensors that were there.

    Attributes:
        peak: the most bytes that were alive behind any operator.
    """

    def __init__(self, there: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._there = [tensor.untyped_storage() for tensor in there]  # held, so that no address is used again
        self._known = {storage._cdata for storage in self._there}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu":
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        known = self._made.get(storage._cdata)
        if storage._cdata in self._known or (known is not None and not known[0].expired()):
            return
        self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if sum(size for _, size in self._made.values()) > self.peak:
            self.peak = max(self.peak, self.alive)

    @property
    def alive(self) -> int:
        """The bytes that are alive now."""
        self._made = {key: entry for key, entry in self._made.items() if not entry[0].expired()}
        return sum(size for _, size in self._made.values())


def private_bytes() -> int:
    """What this process holds alone, as Linux says it; files that are mapped are not among it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def let_go_of_what_is_free() -> None:
    """Give freed memory back, so that what is needed next has to be asked for."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def most_private(work: Callable[[], object]) -> int:
    """The bytes that this process holds alone at the most while it works, beyond those of before; files do not count.

    They are looked at every few milliseconds, while no call holds Python's lock. What the work loads and makes once for
    the process counts, so that it is to be done once before, with something small; and the rest is to be large beside
    some megabytes that Python and C keep. From then on large blocks are returned to the system when they are free.
    """
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**20)
    let_go_of_what_is_free()
    before, most, ended = private_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.003):
            most = max(most, private_bytes() - before)

    watcher = threading.Thread(target=watch)
    thresholds = gc.get_threshold()
    gc.set_threshold(700, 10, 10)  # as for users: the tests raise them
    watcher.start()
    try:
        work()
    finally:
        ended.set()
        watcher.join()
        gc.set_threshold(*thresholds)
    return most
