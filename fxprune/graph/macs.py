"""Counting multiply-accumulates by torch's own counter."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

_aten = torch.ops.aten
_ATTENTION = (
    _aten._scaled_dot_product_flash_attention_for_cpu, _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_efficient_attention, _aten._scaled_dot_product_cudnn_attention,
)  # fmt: skip


def flop_counter() -> FlopCounterMode:
    """torch's counter of floating-point operations, with a formula for attention on every device.

    torch has none for CPUs, and in some versions none for heads that share keys and values.
    """
    return FlopCounterMode(display=False, custom_mapping=dict.fromkeys(_ATTENTION, _attention_flops))


def counted_macs(counter: FlopCounterMode) -> int:
    """The multiply-accumulates that a counter saw: two operations each."""
    return int(counter.get_total_flops()) // 2


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two operations for each query, key and channel of both products; shapes are [..., positions, channels]."""
    operations: int = 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
    return operations
