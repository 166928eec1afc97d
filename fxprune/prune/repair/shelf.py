"""Values of many batches, kept in memory up to a bound and on disk beyond it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

State = dict[str, Any]

MOST_BYTES = 2**31


class Shelf:
    """One state a batch: values by name. What does not fit in `most_bytes`, 2 GiB unless said otherwise, lies in a
    temporary folder until the end.

    Example:
        >>> with Shelf(2**30) as shelf:
        ...     shelf.put(0, {"x": x})
        ...     x = shelf.take(0)["x"]
    """

    def __init__(self, most_bytes: int | None = None) -> None:
        self._most, self._held = MOST_BYTES if most_bytes is None else most_bytes, 0
        self._states: dict[int, tuple[State, int]] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Shelf:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._states.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def put(self, key: int, state: State) -> None:
        """Keep the state of a batch."""
        size = _bytes_of(state)
        if self._held + size <= self._most:
            self._states[key] = state, size
            self._held += size
        else:
            torch.save(state, self._path(key))

    def take(self, key: int) -> State:
        """The state of a batch, which is kept no longer."""
        if key in self._states:
            state, size = self._states.pop(key)
            self._held -= size
            return state
        found: State = torch.load(self._path(key), weights_only=True)
        self._path(key).unlink()
        return found

    def _path(self, key: int) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="fxprune-")
        return Path(self._folder.name, f"{key}.pt")


def _bytes_of(state: Mapping[str, Any]) -> int:
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in pytree.tree_leaves(state)
        if isinstance(tensor, Tensor)
    }
    return sum(storages.values())
