"""What users read of a result: a few lines, a table, or data; the same three of every result."""

from __future__ import annotations

import abc
import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch


class Readable(abc.ABC):
    """A result in three forms; `repr` is the first line of `str`.

    Example:
        >>> report = fxprune.prune.channels(traced, macs=0.5)
        >>> print(report)  # what happened, in a few lines
        >>> print(report.table())  # all of it
        >>> json.dumps(report.to_dict())  # the same as data
    """

    @abc.abstractmethod
    def __str__(self) -> str:
        """What happened, and the figures, in a few lines."""

    @abc.abstractmethod
    def table(self) -> str:
        """All of it as text."""

    def to_dict(self) -> dict[str, Any]:
        """All of it in JSON's types; a key names the unit of its figure where that is no plain count."""
        found: dict[str, Any] = plain(vars(self))
        return found

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {str(self).partition(chr(10))[0]}>"


def columns(rows: Iterable[Sequence[str]]) -> str:
    """Rows of text under each other, every column as wide as its widest cell.

    Example:
        >>> print(columns([("group", "units"), ("conv1.weight", "16")]))
        group         units
        conv1.weight  16
    """
    listed = [*rows]
    widths = [max(map(len, cells)) for cells in zip(*listed, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in listed)
    return "\n".join(line.rstrip() for line in lines)


def change(before: int, after: int) -> str:
    """A count before and after, and the share that is left.

    Example:
        >>> change(1200, 300)
        '1,200 -> 300 (0.250)'
    """
    return f"{before:,} -> {after:,} ({after / max(before, 1):.3f})"


def first_of(items: Iterable[object], most: int = 6) -> str:
    """The first items, and dots where there are more.

    Example:
        >>> first_of(range(9), most=3)
        '0, 1, 2, ...'
    """
    listed = [*map(str, items)]
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")


def counted(count: int, what: str) -> str:
    """How many of something, in the singular or the plural.

    Example:
        >>> counted(1, "output"), counted(2, "output")
        ('1 output', '2 outputs')
    """
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def number(value: float | None) -> str:
    """A difference: two digits, 0 where there is none, a dash where it is not known.

    Example:
        >>> number(0.000123), number(0.0), number(None)
        ('1.2e-04', '0', '-')
    """
    if value is None:
        return "-"
    if value == 0:
        return "0"
    return f"{value:.1e}" if math.isfinite(value) else str(value)


def plain(value: Any) -> Any:
    """A value in JSON's types: records as mappings by field, tensors as lists, paths and what is not finite as text."""
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Iterable):
        return [plain(entry) for entry in value]
    return str(value)
