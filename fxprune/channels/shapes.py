"""Bringing the recorded shapes of a graph up to date; they follow from the axes, so nothing is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.channels.axes import Axis
from fxprune.channels.edits import Kept
from fxprune.channels.values import Value
from fxprune.channels.walk import Result, Walk
from fxprune.graph.error_sites import working_on
from fxprune.graph.mutation import is_mutating
from fxprune.torch_internals import FakeTensor

_Empties = dict[Any, Tensor]


def update_shapes(walk: Walk, kept: Kept, tensors: Mapping[str, Tensor]) -> None:
    """Bring `node.meta["val"]` of every node to the sizes that are kept; those of `tensors` are as they were cut."""
    empties: _Empties = {}
    for node, value in walk.env.items():
        if value is None or "val" not in node.meta:
            continue
        before = node.meta["val"]
        stored = tensors.get(str(node.target)) if node.op == "get_attr" else None
        with working_on(node):
            if stored is not None and isinstance(before, FakeTensor):
                after = _resized(before, stored.shape, empties)
            else:
                after = _updated(value, before, kept, empties)
        if after is not before:
            _allow_any_layout(node)
            node.meta["val"] = after
            node.meta.pop("tensor_meta", None)


def _updated(value: Result, recorded: Any, kept: Kept, empties: _Empties) -> Any:
    if isinstance(value, list) and isinstance(recorded, list | tuple):
        return type(recorded)(_updated(v, r, kept, empties) for v, r in zip(value, recorded, strict=False))
    if not isinstance(value, Value) or not isinstance(recorded, FakeTensor) or value.rank != recorded.dim():
        return recorded
    sizes = [_size(kept, size, axis) for size, axis in zip(recorded.shape, value.axes, strict=True)]
    return _resized(recorded, sizes, empties)


def _resized(recorded: FakeTensor, sizes: Sequence[Any], empties: _Empties) -> FakeTensor:
    if all(new is old for new, old in zip(sizes, recorded.shape, strict=True)):
        return recorded
    return resized(recorded, sizes, empties)


def _size(kept: Kept, size: Any, axis: Axis) -> Any:
    return kept.resized(size, axis) if axis.carries else size


def _allow_any_layout(node: fx.Node) -> None:
    """An axis that is left with one entry can bar a view."""
    if node.target is torch.ops.aten.view.default and not any(map(is_mutating, node.users)):
        node.target = torch.ops.aten.reshape.default


def resized(recorded: FakeTensor, sizes: Sequence[Any], empties: _Empties | None = None) -> FakeTensor:
    """A fake tensor like `recorded` with other sizes and the same order of axes in memory; `empties` saves work."""
    extents = (size if type(size) is int else size.node.expr for size in (*sizes, *recorded.stride()))
    key = (recorded.dtype, recorded.requires_grad, *extents)
    empties = {} if empties is None else empties
    if key not in empties:
        strides = _strides(recorded.stride(), sizes)
        empty = torch.empty_strided(sizes, strides, dtype=recorded.dtype, device="meta")
        empties[key] = empty.requires_grad_(recorded.requires_grad)
    return FakeTensor(recorded.fake_mode, empties[key], recorded.fake_device)


def _strides(before: Sequence[Any], sizes: Sequence[Any]) -> list[Any]:
    """Dense strides in the order of those before; row-major where these are symbols."""
    order = list(range(len(sizes)))
    if all(type(stride) is int for stride in before):
        order.sort(key=lambda dim: -before[dim])
    strides: list[Any] = [1] * len(sizes)
    for outer, inner in zip(order[-2::-1], order[:0:-1], strict=True):
        strides[outer] = strides[inner] * sizes[inner]
    return strides
