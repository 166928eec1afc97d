"""Memory of tensors, counted apart from what is tested: the bytes of all storages that are alive behind an operator."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


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
