"""Operators that summarize axes or mix positions along them: reductions, pooling, interpolation, softmax, scans."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxprune.channels.arguments import bound
from fxprune.channels.axes import ONE, Axis, reduced_shape
from fxprune.channels.edits import Edit
from fxprune.channels.ids import Vector
from fxprune.channels.registry import REGISTRY, OperatorCall, register
from fxprune.channels.statistics import BoundedByZero, PadWithZeros, RootMeanSquare, ScaledMean, counted
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
    """One number for all indices of some axes; channels that are zero there may go, and are counted still."""

    data: fx.Node
    dim: Any = None

    def relate(self, walk: Walk) -> Result:
        value = walk.value(self.data)
        dims = _listed(self.dim, value.rank)
        if self.node.target is aten.mean.dim:
            value = walk.with_means(self.data, value, over=dims)
        value = self._counted(walk, value, dims)
        value = walk.blur(self.node, value, dims, "a reduction over it")
        kept_dims = len(walk.shape(self.node)) == value.rank
        axes = tuple(
            ONE if dim in dims else axis for dim, axis in enumerate(value.axes) if kept_dims or dim not in dims
        )
        result = self.node.meta["val"]
        if isinstance(result, list | tuple):
            return [Value(axes)] * len(result)
        if value.facts is None or not (self._keeps_zeros or self.node.target in _KEEPS_CONSTANTS):
            return Value(axes)
        known = value.facts.inner
        if self._keeps_zeros:
            known = known & (value.facts.value == 0)
        shape = reduced_shape(axes)
        return settled(axes, known.reshape(shape), value.facts.value.reshape(shape))

    @property
    def _keeps_zeros(self) -> bool:
        """Whether zeros add nothing: sums, and norms of a positive order."""
        if self.node.target in _NORMS:
            order = bound(self.node)[_NORMS[self.node.target]]
            return order is None or (isinstance(order, int | float) and order > 0)
        return self.node.target in _SUMS

    def _counted(self, walk: Walk, value: Value, dims: list[int]) -> Value:
        """The value with the axis of channels that is reduced opaque, where zeros on it can be counted."""
        over = [dim for dim in dims if value.axes[dim].carries]
        if len(over) != 1 or not self._counts_zeros:
            return value
        (dim,) = over
        flat, ids = walk.merged(self.node, value, dim)
        if ids is None:
            return flat
        zeros, centre = flat, self._centre(walk, dims)
        if centre is not None:
            zeros = walk.merged(self.node, walk.value(centre.all_input_nodes[0]), dim)[0]
        counted(walk, self.node, zeros, dim, ids, key=self.node.name)
        if self._normalizes:
            walk.normalized.append(ids)
        edit = self._edit(walk, ids, dim, centre)
        if edit is not None:
            walk.edits.append(edit)
        return flat.relayout(dim, Axis.plain(len(ids)))

    @property
    def _counts_zeros(self) -> bool:
        target = self.node.target
        if target in _BOUNDS and isinstance(self.node.meta["val"], list | tuple):
            places = [user for user in self.node.users if user.target is not operator.getitem or user.args[1] != 0]
            return not any(place.users for place in places)  # where the largest stands would shift
        return self._keeps_zeros or target in _BOUNDS or target in _PADDED

    @property
    def _normalizes(self) -> bool:
        """Whether this is a mean square or a variance, by which normalizations written by hand divide."""
        return self.node.target in _PADDED if self.node.target not in _MEANS else squared(self.data) is not None

    def _edit(self, walk: Walk, ids: Vector, dim: int, centre: fx.Node | None) -> Edit | None:
        target = self.node.target
        if self._keeps_zeros:
            return None
        if target in _BOUNDS:
            several = isinstance(self.node.meta["val"], list | tuple)
            results = [user for user in self.node.users if user.args[1] == 0] if several else [self.node]
            return BoundedByZero(self.node, ids, results, _BOUNDS[target])
        name = "self" if "self" in bound(self.node) else "input"
        if target in _MEANS and self.node.meta["val"].dtype != torch.float16:  # where a mean over fewer may overflow
            mean = ScaledMean(self.node, ids, centre)
            gained = root_mean_square(walk, self.node, ids, mean) or divided_by_mean(walk, self.node, ids, mean)
            return gained or mean
        return PadWithZeros(self.node, ids, {name: dim})

    def _centre(self, walk: Walk, dims: list[int]) -> fx.Node | None:
        """The mean over the same axes, where this is the mean of the squares of distances from it."""
        if self.node.target is not aten.mean.dim or self.node.meta["val"].dtype == torch.float16:
            return None
        square = squared(self.data)
        if square is None or square.target is not aten.sub.Tensor or len(square.args) != 2 or square.kwargs:
            return None
        what, mean = square.args
        if not isinstance(what, fx.Node) or not isinstance(mean, fx.Node) or mean.target is not aten.mean.dim:
            return None
        ours, theirs = (bound(node) for node in (self.node, mean))
        rank = len(what.meta["val"].shape)
        if any(map(walk.is_rewritten, (what, mean, square, self.data))):
            return None
        alike = ours["keepdim"] and theirs["keepdim"] and _listed(theirs["dim"], rank) == dims
        same = mean.all_input_nodes == [what] and theirs["dtype"] is None and ours["dtype"] is None
        return mean if alike and same and self.node.meta["val"].dtype == mean.meta["val"].dtype else None


_SUMS = (aten.sum.default, aten.sum.dim_IntList, aten.nansum.default)
# the argument that is their order
_NORMS = {
    aten.linalg_vector_norm.default: "ord", aten.norm.Scalar: "p", aten.norm.ScalarOpt_dim: "p",
    aten.norm.ScalarOpt_dtype: "p", aten.norm.ScalarOpt_dim_dtype: "p",
}  # fmt: skip
_MEANS = (aten.mean.default, aten.mean.dim)
# whether it is a maximum
_BOUNDS = {
    aten.amax.default: True, aten.max.default: True, aten.max.dim: True,
    aten.amin.default: False, aten.min.default: False, aten.min.dim: False,
}  # fmt: skip
# any other that the order of channels does not change
_PADDED = (
    aten.mean.default, aten.mean.dim, aten.var.default, aten.var.dim, aten.var.correction, aten.std.default,
    aten.std.dim, aten.std.correction, aten.var_mean.default, aten.var_mean.dim, aten.var_mean.correction,
    aten.std_mean.default, aten.std_mean.dim, aten.std_mean.correction, aten.logsumexp.default,
)  # fmt: skip
_KEEPS_CONSTANTS = (*_MEANS, aten.amax.default, aten.amin.default, aten.max.default, aten.min.default)


def squared(node: fx.Node) -> fx.Node | None:
    """What a node is the square of; None where it is none."""
    args = node.args
    is_square = (
        node.target is aten.square.default
        or (node.target is aten.pow.Tensor_Scalar and args[1] == 2)
        or (node.target is aten.mul.Tensor and args[0] is args[1])
    )
    found = args[0] if is_square and not node.kwargs else None
    return found if isinstance(found, fx.Node) else None


def root_mean_square(walk: Walk, mean: fx.Node, ids: Vector, otherwise: Edit) -> RootMeanSquare | None:
    """`x * rsqrt(mean(x²) + eps) * gain` by its mean; None where the mean is of another form, or read elsewhere.

    Every step on the way has one reader, so that what changes is seen in the end only.
    """
    data = squared(mean.all_input_nodes[0])
    if data is None or mean.target is not aten.mean.dim or mean.kwargs.get("dtype") is not None:
        return None
    added = _only_user(mean)
    if added is None or added.target is not aten.add.Tensor or added.args[0] is not mean or added.kwargs:
        return None
    eps, root = added.args[1], _only_user(added)
    if not isinstance(eps, float) or root is None or root.target is not aten.rsqrt.default:
        return None
    scaled = _only_user(root)
    if scaled is None or scaled.target is not aten.mul.Tensor or root not in scaled.args:
        return None
    (other,) = [operand for operand in scaled.args if operand is not root] or [None]
    if not isinstance(other, fx.Node) or _uncast(other) is not _uncast(data):
        return None
    following = _only_user(scaled)
    if following is not None and following.target in _CASTS:
        following = _only_user(following)
    if following is None or following.target is not aten.mul.Tensor:
        return None
    gains = [node for node in following.all_input_nodes if node.op == "get_attr"]
    if len(gains) != 1 or any(map(walk.is_rewritten, (data, other, mean, added, root, scaled, gains[0]))):
        return None
    return RootMeanSquare(mean, ids, str(gains[0].target), added, "other", eps, otherwise)


def divided_by_mean(walk: Walk, mean: fx.Node, ids: Vector, otherwise: Edit) -> RootMeanSquare | None:
    """`x / (mean(x) + eps)`, times anything, times a gain, by its mean; None where this is of another form.

    Such are global response norms. Every step on the way has one reader, so that what changes is seen in the end only.
    """
    added = _only_user(mean)
    if mean.target is not aten.mean.dim or mean.kwargs.get("dtype") is not None or added is None:
        return None
    if added.target is not aten.add.Tensor or added.args[0] is not mean or added.kwargs:
        return None
    eps, step = added.args[1], _only_user(added)
    if not isinstance(eps, float) or step is None or step.target is not aten.div.Tensor or step.args[1] is not added:
        return None
    steps = [mean, added]
    while step is not None and not step.kwargs:
        steps.append(step)
        following = _only_user(step)
        factors = [] if following is None else _factors(following)
        if factors.count(step) != 1:
            return None
        others = [factor for factor in factors if isinstance(factor, fx.Node) and factor is not step]
        gain = _gain(others[0]) if others else None
        if gain is not None:
            if any(map(walk.is_rewritten, (*steps, gain))):
                return None
            return RootMeanSquare(mean, ids, str(gain.target), added, "other", eps, otherwise, 1.0)
        step = following if following is not None and following.target is aten.mul.Tensor else None
    return None


def _factors(node: fx.Node) -> Sequence[Any]:
    """What a node multiplies, nothing where it is no product."""
    if node.target is aten.mul.Tensor:
        return node.args
    return node.args[1:3] if node.target is aten.addcmul.default and not node.kwargs else ()


def _gain(node: fx.Node) -> fx.Node | None:
    """The read of the tensor that a node is, or is another shape of; None of anything else, or where others use it."""
    while len(node.users) == 1 and node.target in _SHAPES:
        node = node.all_input_nodes[0]
    return node if node.op == "get_attr" and len(node.users) == 1 else None


_SHAPES = (aten.view.default, aten.reshape.default, aten.unsqueeze.default)
_CASTS = (aten.to.dtype, aten._to_copy.default, aten.type_as.default)


def _uncast(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0] if node.target in _CASTS else node


def _only_user(node: fx.Node) -> fx.Node | None:
    users = [user for user in node.users if user.target is not aten._assert_tensor_metadata.default]
    return users[0] if len(users) == 1 else None


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
        if first == 2:
            value = self._averaged(walk, value)
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

    def _averaged(self, walk: Walk, value: Value) -> Value:
        """The operand with what is known of the means that are taken."""
        whole = self.node.target in _ADAPTIVE_MEANS and all(size == 1 for size in walk.shape(self.node)[2:])
        return walk.with_means(self.data, value) if whole else value


_ADAPTIVE_MEANS = (
    aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
)  # fmt: skip


@register(aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d)
@dataclass(frozen=True, eq=False)
class AveragePooling(Resampling):
    """Means of windows, which may count the zeros around."""

    kernel_size: Any
    stride: Any = ()
    padding: Any = 0
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor_override: int | None = None

    def _averaged(self, walk: Walk, value: Value) -> Value:
        windows, steps = ([size] if type(size) is int else list(size) for size in (self.kernel_size, self.stride))
        padded = any(self.padding) if isinstance(self.padding, list | tuple) else bool(self.padding)
        if padded or self.ceil_mode or self.divisor_override is not None or steps not in ([], windows):
            return value
        return walk.with_means(self.data, value, windows)

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
        sums, size = dim == value.rank - 1 and self.node.target in _SUM_TO_ONE, value.axes[dim].size
        result = Value(value.axes)
        if sums and value.facts is not None and isinstance(size, int) and value.axes[dim].reduced == 1:
            alike = value.facts.inner & value.facts.value.isfinite()  # logits that are the same along the axis
            result = settled(value.axes, alike, torch.tensor(1 / size, dtype=torch.float64))
        return replace(result, sums=sums)


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
