"""Latency of ONNX files in onnxruntime, measured in turns."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np

from fxprune.calling import renamed
from fxprune.errors import ArgumentError, ArgumentTypeError, CompareError
from fxprune.files import check_suffix
from fxprune.graph.calls import Call, as_calls
from fxprune.graph.requirements import require_list
from fxprune.progress import shown
from fxprune.reports import Readable, columns, counted

from .session import Session


@dataclass(frozen=True, repr=False)
class Latency(Readable):
    """How long a file runs: median and quartiles in milliseconds; `ratio` to the first file, paired by round."""

    name: str
    median: float
    quartiles: tuple[float, float]
    ratio: float
    rounds: int

    def __str__(self) -> str:
        low, high = self.quartiles
        return f"{self.name}: {self.median:.3f} ms ({low:.3f} to {high:.3f}), ratio {self.ratio:.3f}"

    def table(self) -> str:
        """A table of this file alone."""
        return Latencies([self]).table()

    def to_dict(self) -> dict[str, Any]:
        """Name, median and quartiles in milliseconds, ratio, rounds."""
        times = {"median_ms": self.median, "quartiles_ms": list(self.quartiles)}
        return {"name": self.name, **times, "ratio": self.ratio, "rounds": self.rounds}


class Latencies(Readable, list[Latency]):
    """What `bench` measured: a `Latency` for each file, in the order in which they were given."""

    def __str__(self) -> str:
        lines = [*map(str, self[:_SHOWN])]
        lines += [f"and {counted(len(self) - _SHOWN, 'file')} more: table() has all"] if len(self) > _SHOWN else []
        return "\n".join(lines)

    def table(self) -> str:
        """A line for each file."""
        rows = [("file", "median ms", "quartiles", "ratio")]
        for latency in self:
            low, high = latency.quartiles
            rows.append((latency.name, f"{latency.median:.3f}", f"{low:.3f} to {high:.3f}", f"{latency.ratio:.3f}"))
        return columns(rows)

    def to_dict(self) -> dict[str, Any]:
        """The files in order."""
        return {"files": [latency.to_dict() for latency in self]}


_SHOWN = 6  # of the files that were measured, where they are printed


@renamed("provider", "providers", lambda provider: (provider,))
@shown("measure latencies")
def bench(
    paths: Sequence[str | os.PathLike[str]],
    *,
    inputs: Any = None,
    batch: int = 1,
    threads: int = 1,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    rounds: int = 50,
    warmup: int = 5,
) -> Latencies:
    """Run several ONNX files in turns, so that what else the machine does meets all of them.

    Inputs are copied to the provider's device before the clock starts, and outputs stay there.

    Args:
        paths: the files. inputs: those of one call: a tensor, a tuple of positional arguments, a dict of keyword
            arguments, or a `Call` of both; None: random values in the shapes that each file states.
        batch: for free sizes at axis 0 of random inputs; other free sizes are 1. threads: within operators.
        providers: onnxruntime's execution providers, in order of preference. rounds: runs of each file that count;
            warmup: before them.

    Returns:
        A list of `Latency`, one for each file; its `table()` has a line each.

    Raises:
        CompareError: a file or a provider cannot be run, or not on these inputs. ArgumentError: nothing to measure.
        SuffixError: a file of another format. ArgumentTypeError: a count that is no integer, or no list of paths.

    Example:
        >>> bench(["dense.onnx", "pruned.onnx"], batch=8)[1].ratio
        0.52
    """
    if isinstance(paths, str | os.PathLike) or not all(isinstance(path, str | os.PathLike) for path in paths):
        raise ArgumentTypeError(
            "bench takes a list of the paths of ONNX files, such as ['dense.onnx', 'pruned.onnx']; modules are written "
            "by fxprune.export.to_onnx first."
        )
    require_list("providers", providers)
    call = measured_call(inputs, len(paths), batch, threads, rounds, warmup)
    for path in paths:
        check_suffix(path, ".onnx", what="measured", cure="Write it by fxprune.export.to_onnx.")
    sessions = [Session(path, providers, threads, tf32=True) for path in paths]
    runs = [bound(session, call, batch) for session in sessions]
    seconds = _seconds_in_turns(runs, warmup + rounds)[warmup:]
    quartiles = np.quantile(seconds, (0.25, 0.5, 0.75), axis=0) * 1e3
    ratios = np.median(seconds / seconds[:, :1], axis=0)
    latencies = Latencies()
    for session, (low, median, high), ratio in zip(sessions, quartiles.T.tolist(), ratios.tolist(), strict=True):
        latencies.append(Latency(session.name, median, (low, high), ratio, rounds))
    return latencies


def measured_call(inputs: Any, files: int, batch: int, threads: int, rounds: int, warmup: int) -> Call | None:
    """The call that is measured, the same for all files; None where no inputs are given.

    Raises:
        ArgumentTypeError: a count is no integer. ArgumentError: it is too small, or inputs are those of several calls.
    """
    for name, count in {"batch": batch, "threads": threads, "rounds": rounds, "warmup": warmup}.items():
        if isinstance(count, bool) or not isinstance(count, Integral):
            raise ArgumentTypeError(f"{name}={count!r}: an integer is needed.")
    if min(files, batch, threads, rounds) < 1 or warmup < 0:
        raise ArgumentError(
            f"{counted(files, 'file')}, batch {batch}, {threads} threads, {rounds} rounds: at least 1 of each."
        )
    calls = [] if inputs is None else as_calls(inputs, error=CompareError)
    if len(calls) > 1:
        raise ArgumentError(f"{len(calls)} calls were given as inputs; one is measured, the same for all files.")
    return calls[0] if calls else None


def bound(session: Session, call: Call | None, batch: int) -> Callable[[], object]:
    """A run of the session on inputs that lie on its device."""
    if call is None:
        return session.bind(session.random(batch))
    session.run(*call)  # names inputs that do not fit
    return session.bind(session.feed(*call))


def _seconds_in_turns(runs: Sequence[Callable[[], object]], rounds: int) -> np.ndarray:
    """The seconds of each run in each round [rounds, runs]."""
    seconds = np.empty((rounds, len(runs)))
    for place in np.ndindex(seconds.shape):
        run = runs[place[1]]
        start = time.perf_counter()
        run()
        seconds[place] = time.perf_counter() - start
    return seconds


# rounds at least and at most, and seconds after which they end, and before which they never do
_LEAST, _MOST, _LONGEST, _SHORTEST = 10, 400, 1.0, 0.1


def time_in_turns(
    paths: Sequence[str | os.PathLike[str]],
    calls: Sequence[Call] | None,
    is_sure: Callable[[np.ndarray], bool],
    *,
    threads: int = 1,
    batch: int = 1,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> np.ndarray:
    """The seconds of ONNX files in rounds [rounds, files], each file on inputs of its own, until they tell enough.

    A single thread on the CPU is timed by the time that it had, so that what else the machine does counts less.

    Args:
        paths: the files. calls: the inputs of each; None: random ones, with so many samples as `batch` says.
        is_sure: from the seconds so far whether they tell enough; asked from a tenth of a second on.
        threads, batch, providers: as for `bench`.

    Raises:
        CompareError: a file or a provider cannot be run, or not on these inputs.
    """
    sessions = [Session(path, providers, threads, tf32=True) for path in paths]
    given = [None] * len(paths) if calls is None else calls
    runs = [bound(session, call, batch) for session, call in zip(sessions, given, strict=True)]
    now = time.thread_time if threads == 1 and [*providers] == ["CPUExecutionProvider"] else time.perf_counter
    for run in runs:
        run()
    order = np.random.default_rng(0)
    rows: list[np.ndarray] = []
    start = time.perf_counter()
    while len(rows) < _MOST:
        row = np.empty(len(runs))
        for place in order.permutation(len(runs)).tolist():
            begin = now()
            runs[place]()
            row[place] = now() - begin
        rows.append(row)
        spent = time.perf_counter() - start
        if len(rows) < _LEAST or spent < _SHORTEST:
            continue
        if spent > _LONGEST or (len(rows) % _LEAST == 0 and is_sure(np.array(rows))):
            break
    return np.array(rows)
