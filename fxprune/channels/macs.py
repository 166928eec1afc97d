"""The multiply-accumulates of a node, as torch counts them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.channels.axes import sizes_of
from fxprune.graph.macs import flop_counter


def measured_macs(node: fx.Node) -> float:
    """What torch's counter finds for the operator at the sample inputs, run on tensors without storage.

    An operator that cannot be run so, since its sizes depend on data, counts nothing.
    """

    def empty(operand: fx.Node) -> Any:
        value = operand.meta.get("val")
        if not isinstance(value, Tensor):
            return value
        return torch.empty(sizes_of(operand), dtype=value.dtype, device="meta")

    target: Callable[..., Any] = node.target  # type: ignore[assignment]
    with flop_counter() as counter, torch.no_grad():
        try:
            target(*fx.node.map_arg(node.args, empty), **fx.node.map_arg(dict(node.kwargs), empty))
        except (RuntimeError, TypeError, NotImplementedError):
            return 0.0
    return float(counter.get_total_flops()) / 2
