"""The multiply-accumulates of a node, as torch counts them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.graph.batch import Batch, evaluated
from fxprune.graph.macs import flop_counter


def measured_macs(node: fx.Node) -> float:
    """What torch's counter finds for the operator at the sizes of `sizes_of`, run on tensors without storage.

    An operator that cannot be run so, since its sizes depend on data, counts nothing.
    """
    batch = Batch.of(node.graph)
    return _measured(node, batch.sizes)


def scale(node: fx.Node, batch: Batch) -> float:
    """What one sample costs at a node, as a share of what the captured ones do."""
    if not batch.is_free:
        return batch.share(node)
    captured = _measured(node, batch.captured)
    if captured:
        return _measured(node, batch.sizes) / captured
    return 1 / batch.size if batch.size and batch.reaches(node) else 1.0


def _measured(node: fx.Node, sizes: Mapping[Any, int]) -> float:
    def empty(operand: fx.Node) -> Any:
        value = operand.meta.get("val")
        owner = operand.graph.owning_module
        if value is None and operand.op == "get_attr" and owner is not None:
            return owner.get_submodule(str(operand.target))  # a graph within, as of `torch.autocast` in a forward
        if isinstance(value, torch.SymInt):
            return evaluated(value, sizes)
        if not isinstance(value, Tensor):
            return value
        shape = [evaluated(size, sizes) for size in value.shape]
        return torch.empty(shape, dtype=value.dtype, device="meta")

    target: Callable[..., Any] = node.target  # type: ignore[assignment]
    with flop_counter() as counter, torch.no_grad():
        try:
            target(*fx.node.map_arg(node.args, empty), **fx.node.map_arg(dict(node.kwargs), empty))
        except (RuntimeError, TypeError, NotImplementedError):
            return 0.0
    return float(counter.get_total_flops()) / 2
