"""Sums and powers of whole numbers that may be large, as hashes are: exact in 64 bits, and beyond them as torch's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fxprune.channels.arguments import bound

aten = torch.ops.aten
SUMS = (aten.sum.default, aten.sum.dim_IntList)
_PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar, *(getattr(aten.pow, name) for name in aten.pow.overloads()))


def may_be_large(node: fx.Node) -> bool:
    """Whether what is summed has products in it; what is given or counted is taken to be below 2^53."""
    return any(before.target in _PRODUCTS for before in _whole_numbers_behind(node.all_input_nodes[0]))


def _whole_numbers_behind(node: fx.Node) -> Iterator[fx.Node]:
    pending, seen = [node], {node}
    while pending:
        node = pending.pop()
        if getattr(node.meta.get("val"), "dtype", None) == torch.int64:
            yield node
            pending += [operand for operand in node.all_input_nodes if operand not in seen]
            seen.update(node.all_input_nodes)


def as_product_with_ones(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """A sum as products with ones, axis by axis: onnxruntime sums in float64, and multiplies matrices in 64 bits."""
    given = bound(node)
    data: fx.Node = given["self"]
    shape = data.meta["val"].shape
    dims = sorted(dim % len(shape) for dim in given.get("dim") or range(len(shape))) if shape else []
    if not dims or node.meta["val"].dtype != torch.int64:
        return None
    call = graph.call_function
    for dim in dims:
        size = shape[dim] if isinstance(shape[dim], int) else call(aten.sym_size.int, (data, dim))
        ones = call(aten.full.default, ([size, 1], 1), {"dtype": torch.int64})
        product = call(aten.matmul.default, (call(aten.transpose.int, (data, dim, -1)), ones))
        data = call(aten.transpose.int, (product, dim, -1))
    return data if given.get("keepdim") else call(aten.squeeze.dims, (data, dims))


def is_power(node: fx.Node) -> bool:
    """Whether whole numbers are raised to a power that is one, which onnxruntime does in float64."""
    return node.meta["val"].dtype == torch.int64 and isinstance(node.args[1], int) and node.args[1] > 1


def as_squares(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A power as squares of squares and what remains."""
    call = graph.call_function
    square: Any
    square, exponent = node.args
    assert isinstance(exponent, int)
    result: Any = None
    while True:
        if exponent % 2:
            result = square if result is None else call(aten.mul.Tensor, (result, square))
        exponent //= 2
        if not exponent:
            return result  # type: ignore[no-any-return]
        square = call(aten.mul.Tensor, (square, square))
