"""Where NaN and inf come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither NaN nor inf; a sum that is finite says so at once."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def origin_of_non_finite(node: fx.Node, values: Mapping[fx.Node, Any]) -> fx.Node:
    """The first node, of those that a node's value comes from, that gives NaN or inf where it reads none."""
    while True:
        guilty = [each for each in node.all_input_nodes if has_non_finite(_value(values, each))]
        if not guilty:
            return node
        node = guilty[0]


def _value(values: Mapping[fx.Node, Any], node: fx.Node) -> Any:
    try:
        return values[node]
    except KeyError:
        return None


def has_non_finite(value: Any) -> bool:
    """Whether NaN or inf are in a value."""
    return any(
        isinstance(each, Tensor) and each.is_floating_point() and not is_finite(each)
        for each in pytree.tree_leaves(value)
    )
