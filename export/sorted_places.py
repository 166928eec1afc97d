"""The places of values among sorted ones, which torch does not translate: how many of these come before each."""

from __future__ import annotations

from typing import Any

from onnxscript import opset18

_INT32, _INT64 = 6, 7
op: Any = opset18


def searchsorted(
    sorted_sequence: Any,
    values: Any,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Any = None,
) -> Any:
    """By value [..., m] among sorted ones [..., n] or [n], how many are smaller; with `right`, equal ones count."""
    if sorter is not None:
        raise NotImplementedError("searchsorted with a sorter: sort the sequence itself")
    last = op.Constant(value_ints=[-1])
    rows = op.Unsqueeze(sorted_sequence, op.Constant(value_ints=[-2]))
    compare = op.LessOrEqual if right or side == "right" else op.Less
    before = op.Cast(compare(rows, op.Unsqueeze(values, last)), to=_INT32 if out_int32 else _INT64)
    return op.ReduceSum(before, last, keepdims=0)


def bucketize(values: Any, boundaries: Any, out_int32: bool = False, right: bool = False) -> Any:
    """The places of values among boundaries [n]."""
    return searchsorted(boundaries, values, out_int32, right)
