"""Operators that summarize axes or mix positions along them: reductions, pooling, interpolation, softmax, scans."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxprune.channels.axes import ONE, Axis, reduced_shape
from fxprune.channels.readers import Reader
from fxprune.channels.registry import REGISTRY, OperatorCall, register
from fxprune.channels.values import Value, settled
from fxprune.channels.walk import Result, Walk

aten = torch.ops.aten


def _listed(dims: Any, rank: int) -> list[int]:
    """The dimensions that an argument names, all where it names none."""
    if dims is None or dims == []:
        return list(range(rank))
    named = dims if isinstance(dims, list | tuple) else [dims]
    return sorted({dim % rank for dim in named}) if rank else []


@register(
    aten.mean, aten.sum, aten.amax, aten.amin, aten.argmax, aten.argmin, aten.var, aten.std, aten.var_mean,
    aten.std_mean, aten.any, aten.all, aten.logsumexp, aten.linalg_vector_norm, aten.norm, aten.prod, aten.nansum,
    aten.median, aten.count_nonzero, aten.max.default, aten.max.dim, aten.min.default, aten.min.dim,
)  # fmt: skip
@dataclass(frozen=True, eq=False)
class Reduction(OperatorCall):
    """One number for all indices of some axes. A sum over channels reads those that are not zero."""

    data: fx.Node
    dim: Any = None

    def relate(self, walk: Walk) -> Result:
        value = walk.value(self.data)
        dims = _listed(self.dim, value.rank)
        if self.node.target in _SUMS:
            value = self._read_summands(walk, value, dims)
        value = walk.blur(self.node, value, dims, "a reduction over it")
        kept_dims = len(walk.shape(self.node)) == value.rank
        axes = tuple(
            ONE if dim in dims else axis for dim, axis in enumerate(value.axes) if kept_dims or dim not in dims
        )
        result = self.node.meta["val"]
        if isinstance(result, list | tuple):
            return [Value(axes)] * len(result)
        if value.facts is None or self.node.target not in _KEEPS_CONSTANTS:
            return Value(axes)
        known = value.facts.inner
        if self.node.target in _SUMS:
            known = known & (value.facts.value == 0)
        shape = reduced_shape(axes)
        return settled(axes, known.reshape(shape), value.facts.value.reshape(shape))

    def _read_summands(self, walk: Walk, value: Value, dims: list[int]) -> Value:
        """A sum over one axis of channels as a reader of it."""
        over = [dim for dim in dims if value.axes[dim].carries]
        if len(over) != 1:
            return value
        (dim,) = over
        value, columns = walk.merged(self.node, value, dim)
        if columns is None:
            return value
        if walk.facts:
            zero = value.zeros.transpose(0, dim).reshape(len(columns), -1).all(1).numpy()
            walk.readers.append(Reader(self.node, None, columns[None], ~zero[None, None]))
        return Value(value.replaced_axis(dim, Axis.plain(len(columns))))


_SUMS = (aten.sum.default, aten.sum.dim_IntList)
_KEEPS_CONSTANTS = (
    *_SUMS, aten.mean.default, aten.mean.dim, aten.amax.default, aten.amin.default, aten.max.default, aten.min.default,
)  # fmt: skip


@register(aten.sort, aten.argsort, aten.topk, aten.kthvalue)
@dataclass(frozen=True, eq=False)
class Ordering(OperatorCall):
    """Values in order along an axis."""

    data: fx.Node
    dim: int = -1

    def relate(self, walk: Walk) -> Result:
        value = walk.value(self.data)
        dims = _listed(self.dim, value.rank)
        value = walk.blur(self.node, value, dims, "a reduction over it")
        shape = walk.shape(self.node)
        if len(shape) == value.rank:
            axes = tuple(Axis.plain(shape[dim]) if dim in dims else axis for dim, axis in enumerate(value.axes))
        else:
            axes = tuple(axis for dim, axis in enumerate(value.axes) if dim not in dims)
        result = self.node.meta["val"]
        return [Value(axes)] * len(result) if isinstance(result, list | tuple) else Value(axes)


@register(
    aten.max_pool1d, aten.max_pool2d, aten.max_pool3d, aten.max_pool1d_with_indices, aten.max_pool2d_with_indices,
    aten.max_pool3d_with_indices, aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d, aten._adaptive_avg_pool2d,
    aten.adaptive_avg_pool3d, aten.adaptive_max_pool1d, aten.adaptive_max_pool2d, aten.adaptive_max_pool3d,
    aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d, aten._upsample_nearest_exact1d,
    aten._upsample_nearest_exact2d, aten._upsample_nearest_exact3d, aten.upsample_linear1d, aten.upsample_bilinear2d,
    aten.upsample_bicubic2d, aten.upsample_trilinear3d, aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa,
)  # fmt: skip
@dataclass(frozen=True, eq=False)
class Resampling(OperatorCall):
    """Lines, images or volumes in another resolution: pooling and interpolation."""

    data: fx.Node

    def relate(self, walk: Walk) -> Result:
        value, shape = walk.value(self.data), walk.shape(self.node)
        first = value.rank - self._space()
        value = walk.blur(self.node, value, range(first, value.rank), "space of a pooling")
        axes = (*value.axes[:first], *(Axis.plain(size) for size in shape[first:]))
        facts = value.facts
        known = Value(axes)
        if facts is not None:
            # every channel is averaged with the same zeros
            border = facts.inner & (facts.value != 0) if self._averages_zeros() else None
            known = settled(axes, facts.inner, facts.value, border)
        return [known, Value(axes)] if isinstance(self.node.meta["val"], list | tuple) else known

    def _space(self) -> int:
        """How many axes of space come last: the operator's name says so, `max_pool2d` and the like."""
        found = re.search(r"([123])d", str(REGISTRY.model(self.node.target)))
        assert found is not None, self.node
        return int(found.group(1))

    def _averages_zeros(self) -> bool:
        """Whether a constant comes out smaller at the border."""
        return False


@register(aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d)
@dataclass(frozen=True, eq=False)
class AveragePooling(Resampling):
    """Means of windows, which may count the zeros around."""

    padding: Any = 0
    count_include_pad: bool = True
    divisor_override: int | None = None

    def _averages_zeros(self) -> bool:
        padded = any(self.padding) if isinstance(self.padding, list | tuple) else bool(self.padding)
        return (padded and self.count_include_pad) or self.divisor_override is not None


@register(aten.softmax, aten._softmax, aten._safe_softmax, aten.log_softmax, aten._log_softmax)
@dataclass(frozen=True, eq=False)
class Softmax(OperatorCall):
    """Weights that sum to one, or their logarithms."""

    data: fx.Node
    dim: int

    def relate(self, walk: Walk) -> Value:
        value = walk.value(self.data)
        dim = self.dim % value.rank
        value = walk.blur(self.node, value, [dim], "softmax over it")
        return Value(value.axes, sums=dim == value.rank - 1 and self.node.target in _SUM_TO_ONE)


# `_safe_softmax` gives zeros where everything is masked
_SUM_TO_ONE = (aten.softmax.int, aten._softmax.default)


@register(aten.cumsum, aten.cumprod, aten.logcumsumexp)
@dataclass(frozen=True, eq=False)
class Scan(OperatorCall):
    """Every index takes part in those behind it."""

    data: fx.Node
    dim: int

    def relate(self, walk: Walk) -> Value:
        value = walk.value(self.data)
        dims = [self.dim % value.rank] if value.rank else []
        return Value(walk.blur(self.node, value, dims, "positions along it matter").axes)


@register(aten.tril, aten.triu)
@dataclass(frozen=True, eq=False)
class Triangle(OperatorCall):
    """The part of matrices on one side of the diagonal."""

    data: fx.Node

    def relate(self, walk: Walk) -> Value:
        value = walk.value(self.data)
        dims = [value.rank - 2, value.rank - 1]
        return Value(walk.blur(self.node, value, dims, "positions along it matter").axes)


@register(aten.diff, aten.gather)
@dataclass(frozen=True, eq=False)
class PositionDependent(OperatorCall):
    """Positions of all operands matter."""

    def relate(self, walk: Walk) -> Result:
        return walk.refuse(self.node, "positions matter")
