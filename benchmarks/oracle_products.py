"""Products with a weight among the calls of a network, in every spelling: which axes are columns, which are rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Layer:
    """A weight: its table [rows, columns] of what is not zero.

    Attributes:
        row_shape, column_shape: of the axes of the weight that rows and columns are.
        row_axes: the axes of the weight that are rows, () where these do not say which row an index is.
        groups: of a convolution.
        pads: whether zeros stand around the input.
    """

    table: Tensor
    row_shape: tuple[int, ...]
    row_axes: tuple[int, ...]
    column_shape: tuple[int, ...]
    groups: int = 1
    pads: bool = False


@dataclass
class Product:
    """A call with a weight: the axes of the operand that are columns, and of the result that are rows."""

    name: str
    data: Tensor
    columns: tuple[int, ...]
    rows: tuple[int, ...]
    layer: Layer


def product(function: str, args: Sequence[Any], kwargs: Mapping[str, Any], names: Mapping[int, str]) -> Product | None:
    """What a call is, if one of its operands is a weight."""
    if function == "embedding" and id(args[1]) in names:
        layer = Layer(torch.ones(args[1].shape[1], 0, dtype=torch.bool), (args[1].shape[1],), (1,), (0,))
        return Product(names[id(args[1])], args[0], (), (-1,), layer)
    named = ("linear", "matmul", "__matmul__", "bmm", "einsum")
    if function not in named and not function.startswith("conv"):
        return None
    operands = args[:2] if function != "einsum" else args[1] if isinstance(args[1], list | tuple) else args[1:]
    weights = [i for i, operand in enumerate(operands) if id(operand) in names]
    if len(weights) != 1 or len(operands) != 2:
        return None
    (at,) = weights
    weight, data, name = operands[at].detach(), operands[1 - at].detach().clone(), names[id(operands[at])]
    if function.startswith("conv"):
        return _convolution(function, args, kwargs, name, data, weight)
    left, right, out = _labels(function, args, data.dim(), at)
    own, other = (left, right) if at == 0 else (right, left)
    row, column = [x for x in own if x in out], [x for x in own if x in other]
    table = weight.permute([own.index(x) for x in row] + [own.index(x) for x in own if x not in row]) != 0
    for position, label in enumerate(row):
        if label in column:  # an axis of both is a block diagonal
            size, index = weight.shape[own.index(label)], len(row) + column.index(label)
            ones = [size if i in (position, index) else 1 for i in range(len(row) + len(column))]
            table = table.unsqueeze(index) & torch.eye(size, dtype=torch.bool).view(ones)
    rows, columns = (tuple(weight.shape[own.index(x)] for x in part) for part in (row, column))
    layer = Layer(table.reshape(math.prod(rows), -1), rows, tuple(map(own.index, row)), columns)
    return Product(name, data, tuple(map(other.index, column)), tuple(map(out.index, row)), layer)


def _labels(function: str, args: Sequence[Any], rank: int, at: int) -> tuple[str, str, str]:
    """The equation of a product, of which operand `at` is the weight."""
    rest = "abcdefgh"[: rank - 1]
    if function == "einsum":
        operands, _, out = str(args[0]).replace(" ", "").partition("->")
        left, right = operands.split(",")
        return left, right, out
    if function == "linear":
        return rest + "y", "zy", rest + "z"
    if function == "bmm":
        return "aby", "ayz", "abz"
    return ("zy", rest[:-1] + "yx", rest[:-1] + "zx") if at == 0 else (rest + "y", "yz", rest + "z")


def _convolution(
    function: str, args: Sequence[Any], kwargs: Mapping[str, Any], name: str, data: Tensor, weight: Tensor
) -> Product | None:
    turned = "transpose" in function
    given = dict(zip(["stride", "padding", "output_padding" if turned else "dilation"], args[3:], strict=False))
    given |= {"groups": args[6]} if len(args) > 6 else {}
    given |= kwargs
    groups, padding = int(given.get("groups", 1)), given.get("padding", 0)
    if groups == data.shape[1] and weight.shape[:2] == (groups, 1):
        return None  # a channel each
    by_group = (weight != 0).flatten(2).any(-1).unflatten(0, (groups, -1))
    table = torch.block_diag(*(by_group.mT if turned else by_group).long()).bool()
    pads = turned or (any(padding) if isinstance(padding, list | tuple) else padding not in (0, "valid"))
    axes = () if turned and groups > 1 else (int(turned),)
    return Product(name, data, (1,), (1,), Layer(table, (len(table),), axes, (table.shape[1],), groups, bool(pads)))
