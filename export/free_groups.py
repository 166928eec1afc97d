"""Convolutions with as many groups as a batch has samples, each with weights of its own, as products.

Conditional convolutions mix weights for each sample, and compute all samples in one call, as groups
(https://arxiv.org/abs/1904.04971). How many groups there are is an attribute in ONNX, a number in the file.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxprune.channels.arguments import bound

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


def has_free_groups(node: fx.Node) -> bool:
    """Whether it is not known how many groups a convolution has, but what each reads."""
    given = bound(node)
    return isinstance(given["groups"], fx.Node) and all(
        isinstance(size, int) for size in given["weight"].meta["val"].shape[1:]
    )


def as_products(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The windows that a convolution reads, which one of ones and zeros gathers, times the weights of their group."""
    call, given = graph.call_function, bound(node)
    data, weight, groups = given["input"], given["weight"], given["groups"]
    channels, *kernel = weight.meta["val"].shape[1:]
    axes, window = len(kernel), math.prod(kernel)

    def sizes(of: fx.Node, shape: torch.Size, dims: list[int]) -> list[Any]:
        return [shape[dim] if isinstance(shape[dim], int) else call(aten.sym_size.int, (of, dim)) for dim in dims]

    batch, *places = sizes(data, data.meta["val"].shape, [0, *range(2, 2 + axes)])
    alone = call(aten.reshape.default, (data, [-1, channels, *places]))
    ones = call(aten.reshape.default, (call(aten.eye.default, (window,), _like(data)), [window, 1, *kernel]))
    ones = call(aten.repeat.default, (ones, [channels, *[1] * (1 + axes)]))
    options = (given["stride"], given["padding"], given["dilation"], channels)
    windows = call(node.target, (alone, ones, None, *options))  # type: ignore[arg-type]
    places = sizes(windows, node.meta["val"].shape, list(range(2, 2 + axes)))
    rows = call(aten.reshape.default, (weight, [groups, -1, channels * window]))
    columns = call(aten.reshape.default, (windows, [batch, groups, channels * window, -1]))
    product = call(aten.reshape.default, (call(aten.matmul.default, (rows, columns)), [batch, -1, *places]))
    if given["bias"] is None:
        return product
    bias = call(aten.reshape.default, (given["bias"], [-1, *[1] * axes]))
    return call(aten.add.Tensor, (product, bias))


def _like(data: fx.Node) -> dict[str, Any]:
    return {"dtype": data.meta["val"].dtype}
