"""Ranges of values: what an activation bounds, a layer of it bounds as well, and a clamp may make one number of that.

A sigmoid lies between 0 and 1 whatever comes in; a convolution and a batch norm of it lie between two numbers by
channel, and where both are negative, the ReLU behind them gives zero. Interval arithmetic says so, with room for what
rounding adds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from fxprune.channels.arguments import bound
from fxprune.channels.axes import reduced_shape
from fxprune.channels.values import Value, beside
from fxprune.channels.walk import Range, Result, Walk
from fxprune.graph.mutation import is_mutating
from fxprune.torch_internals import functional_twin

aten = torch.ops.aten

_ROUNDING = 1e-4  # room for it, as a share of what is summed
_MOST_WEIGHTS = 1 << 22  # of a layer that is looked into
_PRECISE = (torch.float32, torch.float64)

_Rule: TypeAlias = Callable[[Walk, fx.Node, Value], "Range | None"]


@dataclass(frozen=True, eq=False)
class Weights:
    """What a layer multiplies its input by.

    Attributes:
        table: [groups, rows, columns, taps].
        dim: the axis of the input that holds the columns.
        shift: what is added, by row; None where nothing is.
        inside: [pairs, taps], which taps a position meets, 1 or 0, of all that occur; None where it meets all.
    """

    table: Tensor
    dim: int
    shift: Tensor | None
    inside: Tensor | None = None


def ranged(walk: Walk, node: fx.Node, result: Result) -> Result:
    """Note the range of a node's values, if any; returns the result with what of it is one number therefore."""
    if (
        not walk.facts
        or not walk.parameters.follows_ranges
        or not isinstance(result, Value)
        or node.meta["val"].dtype not in _PRECISE
    ):
        return result
    target = functional_twin(node.target) if is_mutating(node) else node.target  # type: ignore[arg-type]
    operand = _operand(walk, node)
    if target in _BOUNDS:
        return _activated(walk, node, result, target, operand)
    rule = _RULES.get(target)
    found = None if rule is None or operand is None else rule(walk, node, result)
    if found is not None:
        walk.ranges[node] = found
    return result


def _operand(walk: Walk, node: fx.Node) -> Range | None:
    """The range of the first operand."""
    return walk.ranges.get(node.all_input_nodes[0]) if node.all_input_nodes else None


def _activated(walk: Walk, node: fx.Node, result: Value, target: Any, operand: Range | None) -> Value:
    """The result of an activation, whose range is noted."""
    given = bound(node)
    low, high = _BOUNDS[target](given)
    if not low <= high:  # arguments that are none, or no numbers
        return result
    if operand is None or target not in _RISING:
        walk.ranges[node] = Range(torch.tensor(low).double(), torch.tensor(high).double())
        return result
    first = node.all_input_nodes[0]

    def of(value: Tensor) -> Tensor:
        computed: Tensor = target(*[value if arg is first else arg for arg in node.args], **node.kwargs)
        return computed.clamp(low, high)

    found = Range(of(operand.low), of(operand.high))
    walk.ranges[node] = found
    where, shape = found.low == found.high, reduced_shape(result.axes)
    if target not in _SATURATING or not where.any() or not _broadcasts(where, shape):
        return result
    fresh = where if result.facts is None else where & ~result.facts.where
    if not fresh.any():
        return result
    walk.by_range.add(node)
    return beside(result, fresh.expand(shape), found.low.expand(shape))


def _broadcasts(tensor: Tensor, shape: Sequence[int]) -> bool:
    try:
        return list(torch.broadcast_shapes(tensor.shape, shape)) == list(shape)
    except RuntimeError:
        return False


def _limits(given: Mapping[str, Any], low: str, high: str) -> tuple[float, float]:
    """Two arguments of a clamp; one that is no number leaves nothing."""
    least, most = (-math.inf if given[low] is None else given[low]), (math.inf if given[high] is None else given[high])
    numbers = all(isinstance(each, int | float) for each in (least, most))
    return (float(least), float(most)) if numbers else _NOTHING


_UPWARDS, _NOTHING = (0.0, math.inf), (1.0, 0.0)
# what activations give, whatever comes in, by their arguments
_BOUNDS: Mapping[Any, Callable[[Mapping[str, Any]], tuple[float, float]]] = {
    aten.relu.default: lambda given: _UPWARDS,
    aten.sigmoid.default: lambda given: (0.0, 1.0),
    aten.hardsigmoid.default: lambda given: (0.0, 1.0),
    aten.tanh.default: lambda given: (-1.0, 1.0),
    aten.hardtanh.default: lambda given: _limits(given, "min_val", "max_val"),
    aten.relu6.default: lambda given: (0.0, 6.0),
    aten.clamp.default: lambda given: _limits(given, "min", "max"),
    aten.softplus.default: lambda given: _UPWARDS if given["beta"] > 0 else _NOTHING,
    aten.abs.default: lambda given: _UPWARDS,
    aten.silu.default: lambda given: (-0.28, math.inf),
    aten.gelu.default: lambda given: (-0.18, math.inf),
    aten.hardswish.default: lambda given: (-0.376, math.inf),
}
# those that never fall, and of these those that give one number for many
_SATURATING = (
    aten.relu.default, aten.hardsigmoid.default, aten.hardtanh.default, aten.relu6.default, aten.clamp.default,
)  # fmt: skip
_RISING = (*_SATURATING, aten.sigmoid.default, aten.tanh.default, aten.softplus.default)


# ---- layers


def note_layer(walk: Walk, node: fx.Node, data: fx.Node, result: Value, layer: Weights) -> None:
    """Note the range of a layer's result, where that of its input is known."""
    operand, table = walk.ranges.get(data), layer.table
    inside = torch.ones(1, table.shape[-1]).double() if layer.inside is None else layer.inside
    if operand is None or table.numel() * len(inside) > _MOST_WEIGHTS or node.meta["val"].dtype not in _PRECISE:
        return
    low, high = (_along(each, layer.dim, table.shape[0] * table.shape[2]) for each in (operand.low, operand.high))
    rows, shape = table.shape[0] * table.shape[1], reduced_shape(result.axes)
    shift = torch.zeros(1) if layer.shift is None else layer.shift.double().reshape(-1)
    if low is None or high is None or shift.numel() not in (1, rows) or math.prod(shape) not in (1, rows):
        return
    if bool((low.isinf() | high.isinf()).all()) and all((sign * table > 0).any(-1).any(-1).all() for sign in (1, -1)):
        return  # without an end on either side
    rising, falling = (
        torch.einsum("grct,pt->pgrc", table.double().clamp(**side), inside).flatten(0, 1)
        for side in ({"min": 0}, {"max": 0})
    )
    ends = []
    for one, other, sign in ((low, high, -1), (high, low, 1)):
        parts = _product(rising, one, table.shape[0]), _product(falling, other, table.shape[0])
        ends.append(_roomy(parts[0] + parts[1] + shift, parts[0].abs() + parts[1].abs() + shift.abs(), sign))
    least, most = ends[0].amin(0), ends[1].amax(0)
    if math.prod(shape) == 1:
        least, most = least.min(), most.max()
    walk.ranges[node] = Range(least.reshape(shape), most.reshape(shape))


def _roomy(end: Tensor, summed: Tensor, sign: int) -> Tensor:
    """An end of a range with room for what rounding adds to the sum of numbers of this size."""
    return torch.where(end.isinf(), end, end + sign * _ROUNDING * summed)


def _product(weights: Tensor, values: Tensor, groups: int) -> Tensor:
    """[pairs, rows], sums of weights [pairs * groups, rows, columns] times values, of which some are infinite.

    A weight of zero hides an infinite one.
    """
    values = values.reshape(1, groups, 1, -1)
    weights = weights.unflatten(0, (-1, groups))
    endless = values.isinf()
    total = (weights * torch.where(endless, 0, values)).sum(-1)
    for sign in (1, -1):
        towards = (weights * torch.where(endless, values.sign(), 0) * sign > 0).any(-1)
        total = torch.where(towards, sign * math.inf, total)
    return total.flatten(1)


def _along(tensor: Tensor, dim: int, count: int) -> Tensor | None:
    """What a range says of the channels on an axis, by channel; the widest where it says it of others."""
    if tensor.numel() == 1:
        return tensor.reshape(1).expand(count)
    return tensor.reshape(-1) if tensor.numel() == count == tensor.shape[dim] else None


def _by_norm(walk: Walk, node: fx.Node, result: Value) -> Range | None:
    """Of a batch norm by running statistics; where there is a train graph too, what these sink may rise in it."""
    operand, given = _operand(walk, node), bound(node)
    parts = [given.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    if operand is None or given["training"] or walk.parameters.trains or None in parts[2:]:
        return None
    zero = torch.zeros(1)
    gain, shift, mean, variance = (zero if part is None else walk.stored(part) for part in parts)
    shape = reduced_shape(result.axes)
    column = [1, -1] + [1] * (len(shape) - 2)
    if gain is None or shift is None or mean is None or variance is None or not _broadcasts(operand.low, shape):
        return None
    gain = torch.ones(1) if parts[0] is None else gain
    factor = (gain.double() / (variance.double() + given["eps"]).sqrt()).view(column)
    shift, mean = shift.double().view(column), mean.double().view(column) * factor
    shift, size = shift - mean, shift.abs() + mean.abs()
    one, other = (torch.where(factor == 0, 0, each * factor) for each in (operand.low, operand.high))
    low, high = torch.minimum(one, other), torch.maximum(one, other)
    low, high = _roomy(low + shift, low.abs() + size, -1), _roomy(high + shift, high.abs() + size, 1)
    return Range(low, high) if _broadcasts(low, shape) else None


# ---- movements of data


def _passed(walk: Walk, node: fx.Node, result: Value) -> Range | None:
    """The same range; that of all channels together where they stand elsewhere."""
    operand, shape = _operand(walk, node), reduced_shape(result.axes)
    if operand is None or operand.low.numel() == 1 or list(operand.low.shape) == shape:
        return operand
    return replace(operand, low=operand.low.min(), high=operand.high.max())


def _padded(walk: Walk, node: fx.Node, result: Value) -> Range | None:
    """Of a padding, or of means that count zeros: zero, or what is padded with, is in the range as well."""
    operand, given = _passed(walk, node, result), bound(node)
    fill = given.get("value") or 0.0
    if operand is None or not isinstance(fill, int | float) or given.get("divisor_override") is not None:
        return None
    return replace(operand, low=operand.low.clamp(max=fill), high=operand.high.clamp(min=fill))


_RULES: Mapping[Any, _Rule] = {
    aten.batch_norm.default: _by_norm,
    **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default, aten.avg_pool2d.default), _padded),
    **dict.fromkeys(
        (aten.max_pool2d.default, aten.adaptive_avg_pool2d.default, aten.upsample_nearest2d.vec, aten.mean.dim,
         aten.slice.Tensor, aten.narrow.default, aten.view.default, aten.reshape.default, aten.flatten.using_ints,
         aten.transpose.int, aten.permute.default, aten.pixel_shuffle.default, aten.clone.default,
         aten.contiguous.default),
        _passed,
    ),
}  # fmt: skip
