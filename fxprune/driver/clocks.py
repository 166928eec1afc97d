"""How long modules take in onnxruntime, finalized."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from fxprune.driver.finalizing import finalize
from fxprune.driver.running import insert_masks
from fxprune.errors import EvalConstantWarning
from fxprune.graph.calls import Call
from fxprune.graph.sharing_copies import sharing_copy
from fxprune.graph.spread_modules import in_whole
from fxprune.graph.traced import TracedModule


@contextlib.contextmanager
def stopwatch(
    traced: TracedModule, *, threads: int, batch: int, providers: Sequence[str]
) -> Iterator[Callable[[Mapping[str, torch.Tensor]], float]]:
    """Yields a function from masks to how many times faster `traced`, finalized with them, runs in onnxruntime.

    Each candidate is exported and timed in turns with `traced` as it is; what is slower than that is no plan.
    """
    from fxprune import export  # it needs onnxruntime, and nothing else here does

    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, "dense.onnx"), Path(folder, "pruned.onnx")]

        def measure(masks: Mapping[str, torch.Tensor]) -> float:
            candidate = sharing_copy(traced)
            insert_masks(candidate, masks)
            _write(candidate, files[1])
            return 1 / export.bench(files, threads=threads, batch=batch, providers=providers)[1].ratio

        _write(traced, files[0])
        yield measure


class Clock:
    """Tells how long modules take in onnxruntime; made by `clock`.

    Args:
        folder: for files. threads, batch, providers: as for `fxprune.export.bench`.
    """

    def __init__(self, folder: Path, threads: int, batch: int, providers: Sequence[str]) -> None:
        from fxprune import export  # it needs onnxruntime, and nothing else here does

        self._export, self._folder = export, folder
        self._threads, self._batch, self._providers = threads, batch, providers

    def whole(self, traced: TracedModule) -> float:
        """The seconds that a module takes, finalized as it is."""
        path = self._folder / "whole.onnx"
        _write(traced, path)
        rounds = self._export.time_in_turns(
            [path], None, lambda rounds: False, threads=self._threads, batch=self._batch, providers=self._providers
        )
        return float(np.quantile(rounds, 0.25))

    def parts(self, sets: Sequence[Sequence[TracedModule]], is_sure: Callable[[np.ndarray], bool]) -> list[np.ndarray]:
        """For each set of finalized modules their seconds in rounds, [rounds, modules]; those of a set run in turns.

        Args:
            sets: the modules, as they stand: at the sizes of their sample inputs.
            is_sure: from such seconds whether they tell enough.
        """
        paths = self._export.to_onnx_files([in_whole(module) for each in sets for module in each], self._folder)
        found, start = [], 0
        for each in sets:
            own = paths[start : start + len(each)]
            start += len(each)
            calls = [Call(module.example_args, {}) for module in each]
            found.append(
                self._export.time_in_turns(own, calls, is_sure, threads=self._threads, providers=self._providers)
            )
        return found


@contextlib.contextmanager
def clock(*, threads: int, batch: int, providers: Sequence[str]) -> Iterator[Clock]:
    """Yields a clock of onnxruntime."""
    with tempfile.TemporaryDirectory() as folder:
        yield Clock(Path(folder), threads, batch, providers)


def _write(traced: TracedModule, path: Path) -> None:
    """Export a module, finalized as it is."""
    from fxprune import export

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EvalConstantWarning)  # nobody trains it on
        export.to_onnx(in_whole(finalize(traced, verify=False)), path, verify=False)
