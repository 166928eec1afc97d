"""Alternating measurements of several candidates in one process, in thread CPU time; ratios of medians."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def timed(run: Callable[[], object]) -> float:
    """Seconds of thread CPU time of one call, garbage collected before it."""
    gc.collect()
    start = time.thread_time()
    run()
    return time.thread_time() - start


def alternate(candidates: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of thread CPU time of each candidate, A B A B; torch runs on one thread."""
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(warmup + rounds):
        for name, run in candidates.items():
            start = time.thread_time()
            run()
            if i >= warmup:
                seconds[name].append(time.thread_time() - start)
    return seconds


def report(seconds: Mapping[str, list[float]]) -> None:
    """Print the median of each candidate and its ratio to every other's."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        quartiles = statistics.quantiles(values, n=4)
        ratios = ", ".join(f"{medians[name] / m:.3f} of {other}" for other, m in medians.items() if other != name)
        print(f"{name}: median {medians[name]:.4f} s (quartiles {quartiles[0]:.4f} to {quartiles[2]:.4f}); {ratios}")
