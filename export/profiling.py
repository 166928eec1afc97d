"""Where the time of an ONNX file goes: onnxruntime's profile, by operator and by node."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fxprune.reports import Readable, columns, counted, first_of

from .latency import bound, measured_call
from .session import Session

_HOLDING = ("If", "Loop", "Scan")  # their time is that of the nodes inside them


@dataclass(frozen=True)
class OperatorTime:
    """One operator of a file: how many nodes of it run, and their milliseconds in a run, all together."""

    nodes: int
    milliseconds: float


@dataclass(frozen=True, repr=False)
class Profile(Readable):
    """Where the time of a run goes; `table()` has a line for each operator.

    Attributes:
        name: the file's.
        operators: by operator, as onnxruntime runs it after its own fusions; what takes longest comes first.
        rounds: runs that counted; times are the median over them.
    """

    name: str
    operators: dict[str, OperatorTime]
    rounds: int

    @property
    def milliseconds(self) -> float:
        """Of all operators together."""
        return sum(each.milliseconds for each in self.operators.values())

    def __str__(self) -> str:
        told = (f"{name} {each.milliseconds:.3f} ms" for name, each in self.operators.items())
        return f"{self.name}: {self.milliseconds:.3f} ms in operators: {first_of(told)}"

    def table(self) -> str:
        """A line for each operator, under the sum."""
        rows = [("operator", "nodes", "ms", "share")]
        whole = self.milliseconds or 1.0
        for name, each in self.operators.items():
            rows.append((name, str(each.nodes), f"{each.milliseconds:.3f}", f"{each.milliseconds / whole:.3f}"))
        return f"{self.name}, {counted(self.rounds, 'run')}\n{columns(rows)}"

    def to_dict(self) -> dict[str, Any]:
        """The profile in JSON's types: an operator is its nodes and its milliseconds."""
        operators = {name: {"nodes": each.nodes, "ms": each.milliseconds} for name, each in self.operators.items()}
        return {"name": self.name, "ms": self.milliseconds, "rounds": self.rounds, "operators": operators}


def profile(
    path: str | os.PathLike[str],
    *,
    inputs: Any = None,
    batch: int = 1,
    threads: int = 1,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    rounds: int = 20,
    warmup: int = 3,
) -> Profile:
    """Run an ONNX file under onnxruntime's profiler, and add up the time of its operators.

    The profiler itself takes time: compare files by `bench`, and say by this where the time is.

    Args:
        path: the file. inputs, batch, threads, providers: as for `bench`.
        rounds: runs that count; warmup: before them.

    Raises:
        CompareError: the file or a provider cannot be run, or not on these inputs. ArgumentError: nothing to measure,
            or several calls. ArgumentTypeError: a count that is no integer. SuffixError: a file of another format.

    Example:
        >>> profile("pruned.onnx").operators["Conv"]
        OperatorTime(nodes=53, milliseconds=11.2)
    """
    call = measured_call(inputs, 1, batch, threads, rounds, warmup)
    with tempfile.TemporaryDirectory() as folder:
        session = Session(path, providers, threads, profile_into=folder, tf32=True)
        run = bound(session, call, batch)
        for _ in range(warmup + rounds):
            run()
        events = json.loads(session.end_profile().read_text(encoding="utf-8"))
    return Profile(session.name, by_operator(events, rounds), rounds)


def by_operator(events: list[dict[str, Any]], rounds: int) -> dict[str, OperatorTime]:
    """Operators by the median of what their nodes took in each of the last runs, the longest first."""
    runs = sorted(event["ts"] for event in events if event["name"] == "model_run")[-rounds:]
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(runs))
    nodes: dict[str, set[str]] = defaultdict(set)
    for event, place in _placed(events, runs):
        operator = event["args"]["op_name"]
        spent[operator][place] += event["dur"] / 1e3
        nodes[operator].add(event["name"])
    found = {name: OperatorTime(len(nodes[name]), statistics.median(times)) for name, times in spent.items()}
    order = Counter({name: each.milliseconds for name, each in found.items()})
    return {name: found[name] for name, _ in order.most_common()}


def _placed(events: list[dict[str, Any]], runs: list[int]) -> Iterator[tuple[dict[str, Any], int]]:
    """The events of kernels, each with the run that it belongs to."""
    kernels = sorted(
        (event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")),
        key=lambda event: event["ts"],
    )
    place = -1
    for event in kernels:
        while place + 1 < len(runs) and runs[place + 1] <= event["ts"]:
            place += 1
        if place >= 0 and event["args"]["op_name"] not in _HOLDING:
            yield event, place
