"""Counting multiply-accumulates by torch's own counter."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

_aten = torch.ops.aten
_ATTENTION = (
    _aten._scaled_dot_product_flash_attention_for_cpu, _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_efficient_attention, _aten._scaled_dot_product_cudnn_attention,
)  # fmt: skip


def flop_counter() -> FlopCounterMode:
    """torch's counter of floating-point operations, with a formula for attention on every device.

    torch has none for CPUs, and in some versions none for heads that share keys and values. Products by groups, as the
    experts of transformers have them, are torch's in bfloat16; others are counted once transformers defined them.
    """
    formulas: dict[Any, Any] = dict.fromkeys(_ATTENTION, _attention_flops) | {_aten._grouped_mm: _grouped_flops}
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        formulas[torch.ops.transformers.grouped_mm_fallback] = _grouped_flops
    return FlopCounterMode(display=False, custom_mapping=formulas)


def counted_macs(counter: FlopCounterMode) -> int:
    """The multiply-accumulates that a counter saw: two operations each."""
    return int(counter.get_total_flops()) // 2


class NodeMacs(contextlib.AbstractContextManager["NodeMacs"]):
    """The multiply-accumulates of each node of a graph that is run within, by torch's counter.

    Attributes:
        macs: by node, of those that have any. Give `watch` to `fxprune.graph.interpretation.run`.
    """

    def __init__(self) -> None:
        self.macs: dict[fx.Node, int] = {}
        self._counter, self._before = flop_counter(), 0

    def __enter__(self) -> NodeMacs:
        self._counter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._counter.__exit__(*error)

    def watch(self, node: fx.Node, value: Any) -> None:
        """A node was computed."""
        total = counted_macs(self._counter)
        if total > self._before:
            self.macs[node], self._before = total - self._before, total


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two operations for each query, key and channel of both products; shapes are [..., positions, channels]."""
    operations: int = 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
    return operations


def _grouped_flops(rows: Any, matrices: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two operations for each row, and each entry of the one matrix that it meets."""
    operations: int = 2 * math.prod(rows) * matrices[-1]
    return operations
