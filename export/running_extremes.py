"""The largest or smallest number so far along an axis, for which ONNX has no operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxprune.channels.arguments import bound

aten = torch.ops.aten
RUNNING: dict[Any, Any] = {aten.cummax.default: aten.maximum.default, aten.cummin.default: aten.minimum.default}


def is_running(node: fx.Node) -> bool:
    """Whether such numbers are all that is read, not their places, along an axis of a known size."""
    data, dim = bound(node)["self"], bound(node)["dim"]
    shape = data.meta["val"].shape
    return bool(shape) and isinstance(shape[dim], int) and all(user.args[1] == 0 for user in node.users if user.users)


def replace_running(graph: fx.Graph, node: fx.Node) -> None:
    """Compare with what is 1, 2, 4, ... places before: each step doubles how far back a number has been compared.

    W. D. Hillis and G. L. Steele, Data parallel algorithms, 1986, https://doi.org/10.1145/7902.7903.
    """
    call = graph.call_function
    data, dim = bound(node)["self"], bound(node)["dim"]
    size = data.meta["val"].shape[dim]
    for width in (2**step for step in range((size - 1).bit_length())):
        first = call(aten.slice.Tensor, (data, dim, 0, width))
        later = call(aten.slice.Tensor, (data, dim, width, size))
        before = call(aten.slice.Tensor, (data, dim, 0, size - width))
        data = call(aten.cat.default, ([first, call(RUNNING[node.target], (later, before))], dim))
    for user in [user for user in node.users if user.args[1] == 0]:
        user.replace_all_uses_with(data)
