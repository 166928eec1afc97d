"""Counting multiply-accumulates by torch's own counter."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def flop_counter() -> FlopCounterMode:
    """torch's counter of floating-point operations, with the formula it lacks for attention on CPU."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={attention: _attention_flops})


def counted_macs(counter: FlopCounterMode) -> int:
    """The multiply-accumulates that a counter saw: two operations each."""
    return int(counter.get_total_flops()) // 2


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(q, k, v))
