"""Whether two graphs compute the same: a graph run in a chosen precision, and outputs compared beyond rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from fxprune.graph.editing import is_mutating

_EXACT, _SINGLE, _HALF = 1e-9, 2e-4, 5e-2


class _Run(fx.Interpreter):
    """Interprets a graph, what is float32 or float64 as `dtype`."""

    def __init__(
        self,
        graph: fx.Graph,
        tensors: Callable[[str], Any],
        dtype: torch.dtype | None,
        watch: Callable[[fx.Node, Any], None] | None,
    ) -> None:
        super().__init__(nn.Module(), graph=graph)
        self.extra_traceback = False  # errors are the operators' own
        self.tensors, self.dtype, self.watch = tensors, dtype, watch

    def cast(self, value: Any) -> Any:
        if self.dtype is None:
            return value
        if isinstance(value, Tensor):
            return value.to(self.dtype) if value.dtype in (torch.float32, torch.float64) else value
        return self.dtype if value is torch.float32 else value

    def fetch_attr(self, target: str) -> Any:
        return self.tensors(target)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map(self.cast, (args, kwargs))
        return super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op in ("placeholder", "get_attr"):
            value = self.cast(value)
        if n.op == "get_attr" and isinstance(value, Tensor) and any(map(is_mutating, n.users)):
            value = value.clone()
        if self.watch is not None:
            self.watch(n, value)
        return value


def run(
    graph: fx.Graph,
    tensors: Callable[[str], Any],
    inputs: list[Any],
    dtype: torch.dtype | None,
    watch: Callable[[fx.Node, Any], None] | None = None,
) -> list[Any]:
    """Interpret a graph, floating point as `dtype`; returns its flat outputs."""
    with torch.no_grad():
        return pytree.tree_leaves(_Run(graph, tensors, dtype, watch).run(*inputs, enable_io_processing=False))


def error(a: Any, b: Any) -> float:
    """The largest difference of two tensors, relative to the largest finite value of the first; NaN equals NaN."""
    if not isinstance(a, Tensor) or not a.numel() or not (a.is_floating_point() or a.is_complex()):
        return 0.0 if not isinstance(a, Tensor) or torch.equal(a, b) else 1.0
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0, a - b).abs()
    scale = torch.where(a.isfinite(), a, 0).abs().max()
    return float((difference / scale.clamp_min(1e-30)).nan_to_num(nan=1.0, posinf=1.0).max())


def close(a: Any, b: Any, tolerance: float | None = None) -> bool:
    """Whether two tensors differ by rounding alone: by a relative `tolerance`, None: that of their type."""
    own = {torch.float64: _EXACT, torch.float32: _SINGLE}.get(getattr(a, "dtype", torch.float32), _HALF)
    return error(a, b) <= (tolerance or own)
