"""Products of rows with the matrix of their group, as mixtures of experts have them: torch has no translation."""

from __future__ import annotations

from typing import Any

from onnxscript import opset18

# What the mixtures of experts of transformers call where they are captured; in bfloat16 it is torch's.
NAMES = ("transformers.grouped_mm_fallback.default", "aten._grouped_mm.default")
_INT64 = 7
op: Any = opset18


def grouped_product(rows: Any, matrices: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """Rows [m, k], sorted by group, times matrices [groups, k, n]; `offs` [groups] are where groups end.

    A product for each group, on its rows alone: one with a matrix for each row would copy matrices.

    Raises:
        NotImplementedError: it is one of the other products that torch's operator has.
    """
    if offs is None or bias is not None or out_dtype is not None or (len(rows.shape), len(matrices.shape)) != (2, 3):
        raise NotImplementedError("of products by groups those of rows with the matrix of their group are translated")
    first, start = op.Constant(value_ints=[0]), op.Constant(value_ints=[0])
    ends, products = op.Cast(offs, to=_INT64), []
    for group in range(int(matrices.shape[0])):
        at = op.Constant(value_ints=[group])
        end = op.Gather(ends, at, axis=0)
        own = op.Slice(rows, start, end, first)
        products.append(op.MatMul(own, op.Squeeze(op.Gather(matrices, at, axis=0), first)))
        start = end
    return op.Concat(*products, axis=0)
