"""What a comparison found, as records, text and JSON."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from fxprune.errors import CompareError
from fxprune.reports import Readable, columns, counted, number, plain

from .divergence import Divergence

_HEAD = ("candidate", "call", "output", "shape", "dtype", "max abs", "max rel", "agrees")
_HEAD_FLOAT64 = ("error", "reference's")


@dataclass(frozen=True)
class Row:
    """One output of one candidate for one call, against the reference's.

    Attributes:
        candidate: its name.
        call: which of the given inputs, from 0.
        output: path of the output, as in `logits`, `[0]`, or of a buffer after a call in train mode, as in
            `buffer bn.running_mean`.
        shape, dtype: the reference's.
        max_abs: largest |candidate - reference|.
        max_rel: the same over the largest finite |reference|; both None where there is nothing to subtract.
        ok: within tolerance.
        note: what is wrong.
        error, reference_error: of the candidate and of the reference against a float64 copy of the reference, relative
            to its largest value; None where there is no such copy.
    """

    candidate: str
    call: int
    output: str
    shape: tuple[int, ...]
    dtype: str
    max_abs: float | None
    max_rel: float | None
    ok: bool
    note: str = ""
    error: float | None = None
    reference_error: float | None = None


@dataclass(frozen=True, repr=False)
class Report(Readable):
    """What `compare` found: `ok`, `rows`, `table()`, `to_dict()` (plain JSON types); `str` says it in short.

    Attributes:
        first_divergence: the first node that differs, for the first output that does; None when all agree, or where
            the two have no names of nodes in common.
        no_float64: why there is no float64 copy of the reference, where one was tried.
        no_search: why the nodes could not be compared, where that was tried.
    """

    reference: str
    mode: str
    rows: tuple[Row, ...]
    first_divergence: Divergence | None = None
    no_float64: str = ""
    no_search: str = ""

    @property
    def ok(self) -> bool:
        """Whether every output of every candidate agrees."""
        return all(row.ok for row in self.rows)

    def __bool__(self) -> bool:
        """The same as `ok`, so that `assert compare(...)` fails where outputs differ."""
        return self.ok

    def __str__(self) -> str:
        worst = self._worst()
        differing = [row for row in worst if not row.ok]
        against = f"against {self.reference}, {self.mode} mode"
        if not differing:
            largest = max((row.max_rel or 0.0 for row in worst), default=0.0)
            names = ", ".join(dict.fromkeys(row.candidate for row in worst))
            text = f"{names} agree{'' if ',' in names else 's'} {against}: {counted(len(worst), 'output')}"
            return f"{text}, largest difference {number(largest)} of the largest value"
        first = differing[0]
        what = f"{len(differing)} of {len(worst)} outputs differ {against}"
        lines = [f"{what}: {first.candidate}, {first.output}: {_difference(first)}"]
        lines += [str(self.first_divergence)] if self.first_divergence else []
        return "\n".join(lines)

    def table(self) -> str:
        """The rows as text, one line an output: the worst of its calls."""
        rows = self._worst()
        lines = [_HEAD, *map(_cells, rows)]
        has_float64 = any(row.error is not None for row in rows)
        if has_float64:
            errors = [_HEAD_FLOAT64, *((number(row.error), number(row.reference_error)) for row in rows)]
            lines = [(*line[:-1], *pair, line[-1]) for line, pair in zip(lines, errors, strict=True)]
        text = [f"against {self.reference}, {self.mode} mode", columns(lines)]
        if has_float64:
            text.append("error, reference's: relative to a float64 copy of the reference")
        if self.no_float64:
            text.append(f"there is no float64 copy of the reference: {self.no_float64}")
        if self.no_search:
            text.append(f"the nodes could not be compared: {self.no_search}")
        if self.first_divergence:
            text.append(str(self.first_divergence))
        return "\n".join(text)

    def _worst(self) -> list[Row]:
        """Of each output of each candidate the row that is worst."""
        worst: dict[tuple[str, str], Row] = {}
        for row in self.rows:
            key = row.candidate, row.output
            worst[key] = max(worst.get(key, row), row, key=_badness)
        return list(worst.values())

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        first = self.first_divergence and self.first_divergence.to_dict()
        found = {name: plain(value) for name, value in vars(self).items() if name != "first_divergence"}
        return {"ok": self.ok, **found, "first_divergence": first}

    def reproduce(self, path: str | os.PathLike[str]) -> None:
        """Write a script that runs the smallest subgraph that differs on both sides; its tensors go beside it.

        Raises:
            CompareError: no node is known to differ. ExportError: the path cannot be written.
        """
        if self.first_divergence is None:
            raise CompareError("no node is known to differ: all outputs agree, or the two share no names of nodes.")
        self.first_divergence.reproduce(path)


def _badness(row: Row) -> tuple[bool, float]:
    return not row.ok, row.max_abs or 0.0


def _cells(row: Row) -> tuple[str, ...]:
    shape = "x".join(map(str, row.shape)) or "scalar"
    verdict = f"{'yes' if row.ok else 'NO'} {row.note}".rstrip()
    return (
        row.candidate, str(row.call), row.output, shape, row.dtype, number(row.max_abs), number(row.max_rel), verdict
    )  # fmt: skip


def _difference(row: Row) -> str:
    if row.max_abs is None:
        return row.note
    return f"{number(row.max_rel)} of the largest value{f' ({row.note})' if row.note else ''}"
