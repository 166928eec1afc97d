"""The operator table: how each operator relates channel ids, what stays constant through it, how it is rewritten.

A rule takes the walk and a node and returns the node's `Val` (or a list, or None for what is no tensor). Pointwise
operators need no entry: they are known by `torch.Tag.pointwise`, and their constants are computed by running them.
An operator without a rule pins everything it touches.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxprune.channels.coupling import (
    Axis,
    Balance,
    Floats,
    Reader,
    Size,
    Val,
    Walk,
    carries,
    length,
    opaque,
    quotient,
    same,
    size,
)
from fxprune.channels.ids import Mask, Vector
from fxprune.channels.registry import TAGGED, operator_name, rule, rule_of

_END = 2**63 - 1


def is_pointwise(target: Any) -> bool:
    return rule_of(target) in (pointwise, symbolic)


def kind(node: Any) -> str:
    return operator_name(node.target)


def argument(node: Any, position: int, name: str, default: Any = None) -> Any:
    """An argument of a node, however it was passed."""
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


def viewed(w: Walk, node: Any) -> Val:
    """The first operand of an operator that may return a view of it."""
    w.shared_storage(node, node.args[0])
    return w.val(node.args[0])


def moved(val: Val, axes: Sequence[Axis], move: Callable[[Tensor], Tensor], sums: bool = False) -> Val:
    """`val` after a movement of data that is `move` on the reduced form."""
    if val.known is False or val.value is None:
        return Val(tuple(axes), sums=sums)
    known = move(val.known) if isinstance(val.known, Tensor) else val.known
    return Val(tuple(axes), known, move(val.value), None if val.border is None else move(val.border), sums)


def settled(axes: Sequence[Axis], known: Tensor, value: Tensor, border: Tensor | None = None) -> Val:
    """A value known where `known` says, expanded to the reduced shape of `axes`."""
    if not known.any():
        return Val(tuple(axes))
    shape = [length(a) for a in axes]
    return Val(tuple(axes), known.expand(shape), value.expand(shape), None if border is None else border.expand(shape))


def wide(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() and value.numel() <= 1 << 20 else value


# ---- pointwise


@rule(
    TAGGED, "hardswish", "log_sigmoid", "__and__", "__or__", "__xor__", "softsign", "copy", "bitwise_not", "nan_to_num"
)
def pointwise(w: Walk, node: Any) -> Any:
    operands: list[fx.Node] = [n for n in node.all_input_nodes if isinstance(w.env.get(n), Val)]
    axes, laid = w.broadcast(node, [w.val(n) for n in operands])
    if not w.facts or len(operands) < len(node.all_input_nodes):
        return Val(axes)
    vals = dict(zip(operands, laid, strict=True))
    name = kind(node)
    masks = [v.inner() for v in laid]
    known = math.prod(masks[1:], start=masks[0]) if masks else torch.ones((), dtype=torch.bool)
    if name == "mul":
        zeros = [m & (v.value == 0) for m, v in zip(masks, laid, strict=True) if v.value is not None]
        if zeros and not known.all():
            known = known | math_or(zeros)
    elif any(v.known is False for v in laid):
        return Val(axes)
    if torch.Tag.nondeterministic_seeded in node.target.tags or not known.any():
        return Val(axes)
    value = run(node, {n: torch.zeros(()) if v.value is None else wide(v.value) for n, v in vals.items()})
    if value is None:
        return Val(axes)
    if name == "mul":
        value = torch.where(known, value, 0)
    return settled(axes, known, value)


def math_or(masks: Sequence[Tensor]) -> Tensor:
    out = masks[0]
    for mask in masks[1:]:
        out = out | mask
    return out


def run(node: Any, values: dict[fx.Node, Tensor]) -> Any:
    """The operator applied to reduced values; None where it cannot take them."""
    target: Any = node.target
    if target._schema.is_mutable:
        first = node.args[0]
        shape = torch.broadcast_shapes(*(v.shape for v in values.values()))
        values = {n: v.expand(shape).clone() if n is first else v for n, v in values.items()}
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    try:
        return target(*args, **kwargs)
    except (RuntimeError, TypeError):
        return None


@rule(
    "clone", "contiguous", "detach", "alias", "lift_fresh_copy", "to", "_to_copy", "type_as", "lift_fresh", "positive"
)
def identity(w: Walk, node: Any) -> Val:
    val = viewed(w, node)
    keep = kind(node) in ("detach", "alias", "contiguous")
    dtype = node.meta["val"].dtype
    if val.value is not None and val.value.is_floating_point() != dtype.is_floating_point:
        return replace(val, value=val.value.to(dtype), source=None)
    return val if keep else replace(val, source=None)


@rule("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
def dropout(w: Walk, node: Any) -> Val:
    val = viewed(w, node)
    return Val(val.axes) if argument(node, 2, "train") else replace(val, source=None)


@rule("prelu")
def prelu(w: Walk, node: Any) -> Val:
    x, slope = w.val(node.args[0]), w.val(node.args[1])
    d = 1 if len(x.axes) > 1 else 0
    if slope.axes[0]:
        axis = w.join(node, [x.axes[d], slope.axes[0]])
        x = w.relayout(x, d, axis)
        slope = w.relayout(slope, 0, axis)
    if x.known is False or slope.known is not True or x.value is None or slope.value is None:
        return Val(x.axes)
    a = slope.value.double().reshape([-1 if i == d else 1 for i in range(len(x.axes))])
    known = x.inner()
    return settled(x.axes, known, torch.where(x.value > 0, x.value, x.value * a))


@rule("glu")
def glu(w: Walk, node: Any) -> Val:
    x = w.val(node.args[0])
    d = argument(node, 1, "dim", -1) % len(x.axes)
    x, ids = w.merged(node, x, d)
    if ids is None:
        return Val(tuple(opaque(s) for s in w.shape(node)))
    n = len(ids) // 2
    w.ids.unify(ids[:n], ids[n:])
    axes = (*x.axes[:d], _axis(w, node, ids[:n]), *x.axes[d + 1 :])
    if x.known is False or x.value is None:
        return Val(axes)
    (a, b), (ka, kb) = (t.split(n, d) for t in (x.value, x.mask()))
    known = (ka & kb) | (ka & (a == 0))
    return settled(axes, known, torch.where(known, a * torch.sigmoid(b), 0))


# ---- values that depend on no input


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "rand", "randn")
def creation(w: Walk, node: Any) -> Val:
    name = kind(node)
    at = 1 if name.startswith("new_") else 0
    axes = tuple(
        ((s, w.ids.fresh(s)),) if type(s) is int and s > 1 and s <= 1 << 14 else opaque(s) for s in w.shape(node)
    )
    _resize(w, node, at, axes)
    fill = argument(node, at + 1, "fill_value") if "full" in name else _FILLS.get(name.removeprefix("new_"))
    return _filled(w, axes, fill)


_FILLS = {"zeros": 0, "ones": 1, "zeros_like": 0, "ones_like": 1}


def _filled(w: Walk, axes: tuple[Axis, ...], fill: Any) -> Val:
    if not w.facts or not isinstance(fill, int | float) or not math.isfinite(fill):
        return Val(axes)
    one = torch.ones([1] * len(axes))
    return settled(axes, one.bool(), one.double() * fill)


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "bernoulli")
def created_like(w: Walk, node: Any) -> Val:
    name = kind(node)
    axes = w.val(node.args[0]).axes
    return _filled(w, axes, argument(node, 1, "fill_value") if name == "full_like" else _FILLS.get(name))


@rule("arange", "scalar_tensor", "linspace", "eye", "tril_indices", "triu_indices")
def positions(w: Walk, node: Any) -> Any:
    return w.unknown(node)


@rule("sym_size", "sym_numel", "sym_stride", "sym_storage_offset", "sym_max", "sym_min", "sym_int", "sym_float",
      "sym_not", "sym_sqrt", "sym_sum", "sym_ite", "sym_constrain_range", "sym_constrain_range_for_size",
      "_assert_scalar", "_assert_async", "_assert_tensor_metadata", "_guards_fn", "mul", "add", "sub", "floordiv",
      "truediv", "mod", "neg", "pow", "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_", "is_", "is_not",
      "contains", "max", "min", "int", "float")  # fmt: skip
def symbolic(w: Walk, node: Any) -> Any:
    """Arithmetic on sizes; the tensor operators that share a name with it are pointwise or reductions."""
    if isinstance(node.meta.get("val"), Tensor | list | tuple):
        one = kind(node) in ("max", "min") and len(node.all_input_nodes) == 1
        return reduction(w, node) if one else pointwise(w, node)
    if node.target is torch.ops.aten._assert_tensor_metadata.default and len(node.args) > 1:
        w.edits.append(lambda k: setattr(node, "args", (node.args[0], None, None, *node.args[3:])))
    return None


@rule("getitem")
def getitem(w: Walk, node: Any) -> Any:
    items = w.env[node.args[0]]
    if isinstance(items, list):
        w.shared_storage(node, node.args[0])
        return items[node.args[1]]
    return None


# ---- shapes


def _axis(w: Walk, node: Any, ids: Vector) -> Axis:
    if len(ids) == 1:
        w.pin(node, ids, "a single index is taken")
        return ()
    w.nonempty.append(ids)
    return ((len(ids), ids),)


def _resize(w: Walk, node: Any, at: int, axes: Sequence[Axis], name: str = "size") -> None:
    """Rewrite the literal sizes in argument `at` (a list or varargs) for what remains of `axes`."""
    if not any(map(carries, axes)):
        return

    def edit(kept: Any) -> None:
        sizes = list(argument(node, at, name))
        for k, axis in enumerate(axes):
            sizes[k] = kept.resize(node, sizes[k], axis)
        if at < len(node.args):
            node.update_arg(at, sizes)
        else:
            node.update_kwarg(name, sizes)

    w.edits.append(edit)


def refactor(w: Walk, node: Any, factors: list[Any], sizes: Sequence[Size]) -> list[Axis] | None:
    """The factors of one row-major layout regrouped into axes of these sizes, split where they must be."""
    stack = [f for f in reversed(factors)]
    axes: list[Axis] = []
    for extent in sizes:
        axis: list[Any] = []
        while not same(extent, 1):
            if not stack:
                return None
            n, ids = stack.pop()
            if same(n, extent):
                axis.append((n, ids))
                break
            rest = quotient(extent, n)
            if rest is not None:
                axis.append((n, ids))
                extent = rest
                continue
            tail = quotient(n, extent)
            if tail is None:
                return None
            a, b = (None, None) if ids is None else w.ids.split(ids, extent)
            axis.append((extent, a))
            stack.append((tail, b))
            break
        axes.append(tuple(axis))
    return axes if not stack else None


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as")
def view(w: Walk, node: Any) -> Val:
    x, sizes = viewed(w, node), w.shape(node)
    axes = refactor(w, node, [f for a in x.axes for f in a], sizes)
    if axes is None:
        w.pin(node, x, f"regroups sizes {list(map(str, x.sizes()))} into {list(map(str, sizes))}")
        return Val(tuple(opaque(s) for s in sizes))
    name = kind(node)
    if name in ("view", "reshape", "_unsafe_view"):
        _resize(w, node, 1, axes)
    elif name == "unflatten":
        d = argument(node, 1, "dim") % len(x.axes)
        _resize(w, node, 2, axes[d : d + len(argument(node, 2, "sizes"))], "sizes")
    last = bool(x.axes and axes and same(size(x.axes[-1]), size(axes[-1])))
    return moved(x, axes, lambda t: t.reshape([length(a) for a in axes]), x.sums and last)


@rule("permute", "transpose", "t", "swapaxes", "swapdims", "numpy_T", "mT", "movedim", "moveaxis", "adjoint")
def permutation(w: Walk, node: Any) -> Val:
    x = viewed(w, node)
    order, name = list(range(len(x.axes))), kind(node)
    if name == "permute":
        order = [d % len(order) for d in node.args[1]]
    elif name in ("movedim", "moveaxis"):
        order = _moved_order(node, len(order))
    elif name == "numpy_T":
        order.reverse()
    elif len(order) > 1:
        a, b = (node.args[1], node.args[2]) if len(node.args) > 2 else (-2, -1)
        order[a], order[b] = order[b], order[a]
    return moved(x, [x.axes[d] for d in order], lambda t: t.permute(order), x.sums and order[-1:] == [len(order) - 1])


def _moved_order(node: Any, rank: int) -> list[int]:
    source, target = ([d % rank for d in (a if isinstance(a, list | tuple) else [a])] for a in node.args[1:3])
    order = [d for d in range(rank) if d not in source]
    for to, come in sorted(zip(target, source, strict=True)):
        order.insert(to, come)
    return order


@rule("unsqueeze", "squeeze")
def squeezed(w: Walk, node: Any) -> Val:
    x = viewed(w, node)
    rank = len(x.axes)
    dims = argument(node, 1, "dim", [d for d in range(rank) if not x.axes[d]])
    if kind(node).startswith("unsqueeze"):
        d = dims % (rank + 1)
        return moved(x, [*x.axes[:d], (), *x.axes[d:]], lambda t: t.unsqueeze(d), x.sums and d < rank)
    gone = {d % rank for d in (dims if isinstance(dims, list | tuple) else [dims])} if rank else set()
    gone = {d for d in gone if not x.axes[d]}
    axes = [a for d, a in enumerate(x.axes) if d not in gone]
    return moved(x, axes, lambda t: t.squeeze(sorted(gone)), x.sums and rank - 1 not in gone)


@rule("expand", "broadcast_to", "expand_as")
def expand(w: Walk, node: Any) -> Val:
    x = viewed(w, node)
    if kind(node) == "expand_as":
        axes, (x, _) = w.broadcast(node, [x, w.val(node.args[1])])
        return settled(axes, x.mask(), x.value) if x.value is not None else Val(axes)
    shape = w.shape(node)
    x = w.lead(x, len(shape) - len(x.axes))
    axes = tuple(
        a if a or same(s, 1) else ((s, w.ids.fresh(s)),) if type(s) is int else opaque(s)
        for a, s in zip(x.axes, shape, strict=True)
    )
    _resize(w, node, 1, axes)
    out = settled(axes, x.mask(), x.value, x.border) if x.value is not None else Val(axes)
    return replace(out, sums=x.sums and bool(x.axes[-1]))


@rule("repeat", "tile")
def repeat(w: Walk, node: Any) -> Val:
    counts = list(argument(node, 1, "repeats" if "repeats" in str(node.target._schema) else "dims"))
    x = w.val(node.args[0])
    if len(counts) < len(x.axes):
        counts = [1] * (len(x.axes) - len(counts)) + counts
    x = w.lead(x, len(counts) - len(x.axes))
    extra: list[Axis] = []
    for count in counts:
        count = count.meta["val"] if isinstance(count, fx.Node) else count
        extra.append(() if same(count, 1) else ((count, w.ids.fresh(count) if type(count) is int else None),))
    axes = [e + a for e, a in zip(extra, x.axes, strict=True)]
    if len(counts) == len(argument(node, 1, "repeats" if "repeats" in str(node.target._schema) else "dims")):
        _resize(w, node, 1, extra, "repeats")
    else:
        w.pin(node, tuple(f for e in extra for f in e), "repeats fewer axes than there are")
    if x.value is None:
        return Val(tuple(axes))
    shape = [n for e, a in zip(extra, x.axes, strict=True) for n in (length(e), length(a))]
    final = [length(a) for a in axes]

    def spread(t: Tensor) -> Tensor:
        return t.reshape([n for a in x.axes for n in (1, length(a))]).expand(shape).reshape(final)

    return moved(replace(x, known=x.mask()), axes, spread)


@rule("repeat_interleave")
def repeat_interleave(w: Walk, node: Any) -> Any:
    count, d = node.args[1], argument(node, 2, "dim")
    if not isinstance(count, int) or d is None:
        return w.refuse(node)
    x = w.val(node.args[0])
    d %= len(x.axes)
    ids = w.ids.fresh(count)
    w.edits.append(lambda k: node.update_arg(1, k.count(ids)))
    axes = [*x.axes[:d], (*x.axes[d], (count, ids)), *x.axes[d + 1 :]]
    return moved(replace(x, known=x.mask()), axes, lambda t: t.repeat_interleave(count, d))


@rule("slice", "narrow")
def slice_(w: Walk, node: Any) -> Val:
    x = viewed(w, node)
    narrow = kind(node) == "narrow"
    d = argument(node, 1, "dim", 0) % len(x.axes)
    start, step = argument(node, 2, "start"), argument(node, 4, "step", 1)
    end = argument(node, 3, "length" if narrow else "end")
    new = w.shape(node)[d]
    if narrow and isinstance(start, int) and isinstance(end, int):
        end += start
    if same(size(x.axes[d]), new) and step == 1:
        if not narrow and carries(x.axes[d]) and (start, end) != (0, _END):
            w.edits.append(lambda k: setattr(node, "args", (node.args[0], d, 0, _END)))
        elif narrow:
            axis = x.axes[d]
            w.edits.append(lambda k: node.update_arg(3, k.resize(node, end, axis)))
        return replace(x, source=None)
    if not carries(x.axes[d]):
        return replace(x, axes=(*x.axes[:d], opaque(new), *x.axes[d + 1 :]), source=None)
    x, ids = w.merged(node, x, d)
    if ids is None or not all(v is None or isinstance(v, int) for v in (start, end)):
        x = w.blur(node, x, [d], "sliced at a free position")
        return replace(x, axes=(*x.axes[:d], opaque(new), *x.axes[d + 1 :]), source=None)
    at = slice(start, end, step)
    first, last, _ = at.indices(len(ids))
    index = np.arange(len(ids))[at]
    if step == 1:

        def edit(kept: Any) -> None:
            a, b = kept.count(ids[:first]), kept.count(ids[:last])
            node.args = (node.args[0], d, a, b - a if narrow else b)

        w.edits.append(edit)
    elif len(ids) % step == 0 and first < step and last > len(ids) - step:
        _, lanes = w.ids.split(ids, len(ids) // step)
        w.pin(node, lanes, "taken by stride")
        w.edits.append(lambda k: setattr(node, "args", (node.args[0], d, first, _END, step)))
    else:
        w.pin(node, ids, "taken by a stride that does not divide the axis")
    axes = (*x.axes[:d], _axis(w, node, ids[at]), *x.axes[d + 1 :])
    take = torch.from_numpy(index)
    return moved(x, axes, lambda t: t.index_select(d, take))


@rule("select")
def select(w: Walk, node: Any) -> Val:
    x = viewed(w, node)
    d = argument(node, 1, "dim") % len(x.axes)
    index = argument(node, 2, "index")
    rest = (*x.axes[:d], *x.axes[d + 1 :])
    x, ids = w.merged(node, x, d)
    if ids is None or not isinstance(index, int):
        x = w.blur(node, x, [d], "selected at a free position")
        return moved(x, rest, lambda t: t.squeeze(d))
    index %= len(ids)
    w.pin(node, ids[index : index + 1], "a single index is taken")
    w.edits.append(lambda k: node.update_arg(2, k.count(ids[:index])))
    return moved(x, rest, lambda t: t.select(d, index))


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "tensor_split")
def split(w: Walk, node: Any) -> list[Val]:
    x = viewed(w, node)
    d = argument(node, 2, "dim", 0) % len(x.axes)
    sizes = [v.shape[d] for v in node.meta["val"]]
    x, ids = w.merged(node, x, d)
    if ids is None:
        return [replace(x, axes=(*x.axes[:d], opaque(s), *x.axes[d + 1 :]), source=None) for s in sizes]
    ends = np.cumsum(sizes)
    parts = np.split(ids, ends[:-1])

    def edit(kept: Any) -> None:
        node.target = torch.ops.aten.split_with_sizes.default
        node.args, node.kwargs = (node.args[0], [kept.count(p) for p in parts], d), {}

    w.edits.append(edit)
    found = []
    for part, end in zip(parts, ends, strict=True):
        take = functools.partial(torch.narrow, dim=d, start=int(end) - len(part), length=len(part))
        found.append(moved(x, (*x.axes[:d], _axis(w, node, part), *x.axes[d + 1 :]), take))
    return found


@rule("unbind")
def unbind(w: Walk, node: Any) -> list[Val]:
    x = viewed(w, node)
    d = argument(node, 1, "dim", 0) % len(x.axes)
    rest = (*x.axes[:d], *x.axes[d + 1 :])
    x = w.flat(node, x, d)
    w.pin(node, x.axes[d], "each index is taken")
    places = [i * carries(x.axes[d]) for i in range(len(node.meta["val"]))]
    return [moved(x, rest, functools.partial(torch.select, dim=d, index=i)) for i in places]


@rule("cat", "concat", "concatenate", "stack")
def cat(w: Walk, node: Any) -> Val:
    vals, stacked = [w.val(n) for n in node.args[0]], kind(node) == "stack"
    rank = len(w.shape(node))
    vals = [v for v in vals if len(v.axes) == rank or stacked]  # legacy: one-dimensional empty tensors are skipped
    d = argument(node, 1, "dim", 0) % rank
    if stacked:
        vals = [moved(v, (*v.axes[:d], (), *v.axes[d:]), lambda t: t.unsqueeze(d)) for v in vals]
    axes: list[Axis] = []
    for k in range(rank):
        axes.append(() if k == d else w.join(node, [v.axes[k] for v in vals]))
        if k != d:
            vals = [w.relayout(v, k, axes[k]) if v.axes[k] and v.axes[k] is not axes[k] else v for v in vals]
    if (not stacked and not any(carries(v.axes[d]) for v in vals)) or not all(
        type(s) is int for v in vals for s in (f[0] for f in v.axes[d])
    ):
        for v in vals:
            w.pin(node, v.axes[d], "concatenated with an axis of free size")
        vals = [w.relayout(v, d, ((size(v.axes[d]), None),)) for v in vals]
        axes[d] = opaque(w.shape(node)[d])
        if any(v.known is False for v in vals) or not vals:
            return Val(tuple(axes))
        first = vals[0].value
        known = math.prod([v.inner() & (v.value == first) for v in vals[1:]], start=vals[0].inner())
        assert isinstance(first, Tensor)
        return settled(axes, known, first)
    parts: list[Vector] = []
    flat = [w.merged(node, v, d) for v in vals]
    vals = [v for v, _ in flat]
    for v, ids in flat:
        if ids is None:
            ids = w.ids.fresh(size(v.axes[d]))
            w.pin(node, ids, "an operand that carries no channels")
        parts.append(ids)
    axes[d] = ((sum(map(len, parts)), np.concatenate(parts)),)
    if all(v.known is False for v in vals):
        return Val(tuple(axes))
    shapes = [[len(p) if k == d else length(a) for k, a in enumerate(axes)] for p in parts]

    def joined(tensors: list[Tensor | None], dtype: torch.dtype) -> Tensor:
        empty = torch.zeros((), dtype=dtype)
        return torch.cat([(empty if t is None else wide(t)).expand(s) for t, s in zip(tensors, shapes, strict=True)], d)

    known = joined([None if v.value is None else v.mask() for v in vals], torch.bool)
    value = joined([v.value for v in vals], torch.float64)
    border = joined([v.border for v in vals], torch.bool) if any(v.border is not None for v in vals) else None
    if border is not None and sum(v.border is not None for v in vals) > 1:
        known, border = known & ~border, None  # borders of different widths do not merge
    return settled(axes, known, value, border)


@rule("flip", "roll")
def rotated(w: Walk, node: Any) -> Any:
    x = w.val(node.args[0])
    flip = kind(node) == "flip"
    dims: Any = argument(node, 1 if flip else 2, "dims", [])
    dims = dims if isinstance(dims, list | tuple) else [dims]
    shifts: Any = [] if flip else argument(node, 1, "shifts")
    shifts = list(shifts) if isinstance(shifts, list | tuple) else [shifts]
    if not dims:
        return w.refuse(node, "rolls over all axes")
    axes = list(x.axes)
    lost = [d % len(axes) for d in dims if carries(x.axes[d])]
    for i, d in enumerate(dims):
        if not carries(axes[d]):
            continue
        ids = w.vector(node, axes[d])
        if ids is None:
            axes[d] = opaque(size(axes[d]))
            continue
        x = w.flat(node, x, d % len(axes))
        n = len(ids)
        turn = 0 if flip else shifts[i] % n
        axes[d] = ((n, ids[::-1].copy() if flip else np.roll(ids, turn)),)
        if not flip:

            def edit(kept: Any, i: int = i, tail: Vector = ids[n - turn :]) -> None:
                new: Any = argument(node, 1, "shifts")
                new = list(new) if isinstance(new, list | tuple) else [new]
                new[i] = kept.count(tail)
                node.update_arg(1, new)

            w.edits.append(edit)
    if not lost:
        return replace(x, source=None)
    full = [s if d % len(axes) in lost else 0 for s, d in zip(shifts, dims, strict=True)] if not flip else []
    return moved(x, axes, lambda t: t.flip(lost) if flip else t.roll(full, dims))


@rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
      "replication_pad2d", "replication_pad3d", "_pad_circular")  # fmt: skip
def pad(w: Walk, node: Any) -> Any:
    x = w.val(node.args[0])
    amounts = list(node.args[1])
    name = kind(node)
    mode = argument(node, 2, "mode", "constant") if name == "pad" else "constant" if name == "constant_pad_nd" else name
    fill = (argument(node, 3, "value") if name == "pad" else argument(node, 2, "value")) or 0
    out = w.shape(node)
    padded = [len(x.axes) - 1 - i // 2 for i in range(0, len(amounts), 2) if amounts[i : i + 2] != [0, 0]]
    axes = list(x.axes)
    spatial = False
    for d in padded:
        x, ids = w.merged(node, x, d)
        at = 2 * (len(axes) - 1 - d)
        before, after = amounts[at : at + 2]
        if ids is None or mode != "constant" or not all(isinstance(a, int) and a >= 0 for a in (before, after)):
            x = w.blur(node, x, [d], f"{mode} padding of the channels")
            axes[d] = opaque(out[d])
            spatial = True
            continue
        left, right = w.ids.fresh(before), w.ids.fresh(after)
        ids = np.concatenate([left, ids, right])
        axes[d] = ((len(ids), ids),)

        def edit(kept: Any, at: int = at, left: Vector = left, right: Vector = right) -> None:
            new = list(node.args[1])
            new[at : at + 2] = kept.count(left), kept.count(right)
            node.update_arg(1, new)

        w.edits.append(edit)
        if w.facts:
            shape = [length(a) for a in x.axes]
            known, value, border = x.mask(), x.value, x.border
            value = torch.zeros(shape).double() if value is None else value
            grow = [0] * at + [before, after]
            x = Val(
                (*x.axes[:d], axes[d], *x.axes[d + 1 :]),
                torch.nn.functional.pad(known, grow, value=True),
                torch.nn.functional.pad(value, grow, value=fill),
                None if border is None else torch.nn.functional.pad(border, grow),
            )
        else:
            x = Val((*x.axes[:d], axes[d], *x.axes[d + 1 :]))
    x = replace(x, axes=tuple(axes), source=None)
    if x.known is False or mode != "constant" or not spatial:
        return x
    assert x.value is not None
    known = x.inner()
    border = known & (x.value != fill)
    return replace(x, known=known, border=border) if fill == 0 else replace(x, known=known & ~border, border=None)


@rule("index", "index_select")
def index(w: Walk, node: Any) -> Any:
    x = w.val(node.args[0])
    if kind(node) == "index_select":
        d = node.args[1] % len(x.axes)
        indices: list[Any] = [None] * d + [node.args[2]]
    else:
        indices = list(node.args[1])
    used = [d for d, i in enumerate(indices) if i is not None]
    out = w.shape(node)
    constant: Any = w.val(indices[used[0]]) if len(used) == 1 else None
    x = w.flat(node, x, used[0]) if len(used) == 1 else x
    axis = x.axes[used[0]] if len(used) == 1 else ()
    if constant is None or not carries(axis) or constant.known is not True or len(constant.axes) != 1:
        x = w.blur(node, x, used, "indexed by data")
        for i in used:
            w.pin(node, indices[i], "used as an index")
        if kind(node) == "index" and used and used != list(range(used[0], used[-1] + 1)):
            return w.refuse(node, "indexes axes that are apart")
        boolean = any(w.env[indices[i]] and indices[i].meta["val"].dtype in (torch.bool, torch.uint8) for i in used)
        if boolean:
            return w.refuse(node, "the result's size depends on data")
        count = len(out) - (len(x.axes) - len(used))
        axes = [*x.axes[: used[0]], *(opaque(s) for s in out[used[0] : used[0] + count]), *x.axes[used[-1] + 1 :]]
        return moved(x, axes, lambda t: t.reshape([length(a) for a in axes]))
    d = used[0]
    ids, order = axis[0][1], constant.value
    assert ids is not None
    order = order.long() % len(ids)
    taken = ids[order.numpy()]
    own = constant.axes[0][0][1] if constant.axes[0] else None
    new = _axis(w, node, taken)
    if own is not None:
        w.ids.unify(own, taken)
    source = indices[d]
    while source.op != "get_attr" and source.target in _COPIES:
        source = source.args[0]
    if source.op == "get_attr" and w.uses.get(str(source.target)) == 1:
        name = str(source.target)
        w.edits.append(lambda k: k.reindex(name, ids, order))
    else:
        w.pin(node, ids, "indexed by a computed constant")
    return moved(x, (*x.axes[:d], new, *x.axes[d + 1 :]), lambda t: t.index_select(d, order))


_COPIES = tuple(getattr(torch.ops.aten, n).default for n in ("lift_fresh_copy", "detach", "detach_", "alias"))


@rule("embedding")
def embedding(w: Walk, node: Any) -> Val:
    weight = w.blur(node, w.val(node.args[0]), [0], "rows are looked up by data")
    w.pin(node, w.val(node.args[1]), "used as an index")
    axes = (*(opaque(s) for s in w.shape(node)[:-1]), weight.axes[1])
    return moved(replace(weight, axes=axes), axes, lambda t: t.reshape([1] * (len(axes) - 1) + [-1]))


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle")
def shuffle(w: Walk, node: Any) -> Any:
    x = w.val(node.args[0])
    name = kind(node)
    r: Any = node.args[1]
    d = 1 if "channel" in name else len(x.axes) - 3
    out = [opaque(s) for s in w.shape(node)]
    channel = x.axes[d]
    others = [k for k in range(len(x.axes)) if k > d]
    x = w.blur(node, x, others, "space of a shuffle")
    if name == "pixel_unshuffle":
        axes = [*x.axes[:d], (*channel, (r * r, None)), *out[d + 1 :]]
        return moved(x, axes, lambda t: t.reshape([length(a) for a in axes]))
    total = size(channel)
    parts = refactor(w, node, list(channel), [total // r**2, r**2] if name == "pixel_shuffle" else [r, total // r])
    if parts is None:
        return w.refuse(node, "regroups the channels")
    split_axes = [*x.axes[:d], *parts, *x.axes[d + 1 :]]
    x = moved(x, split_axes, lambda t: t.reshape([length(a) for a in split_axes]))
    if name == "pixel_shuffle":
        x = w.blur(node, x, [d + 1], "positions within a pixel")
        return moved(x, [*x.axes[:d], x.axes[d], *out[d + 1 :]], lambda t: t.squeeze(d + 1))
    w.pin(node, parts[0], "groups of a shuffle")
    merged = [*x.axes[:d], parts[1] + parts[0], *out[d + 1 :]]
    return moved(x, merged, lambda t: t.transpose(d, d + 1).reshape([length(a) for a in merged]))


@rule("im2col", "unfold")
def unfold(w: Walk, node: Any) -> Any:
    x = w.val(node.args[0])
    if node.target is torch.ops.aten.unfold.default:
        d = node.args[1] % len(x.axes)
        x = w.blur(node, x, [d], "cut into windows")
        shape = w.shape(node)
        return moved(x, [*x.axes[:d], opaque(shape[d]), *x.axes[d + 1 :], opaque(shape[-1])], lambda t: t.unsqueeze(-1))
    kernel, padding = node.args[1], argument(node, 3, "padding", [0])
    d = len(x.axes) - 3
    x = w.blur(node, x, [d + 1, d + 2], "space of a convolution")
    out = moved(
        x, [*x.axes[:d], (*x.axes[d], (math.prod(kernel), None)), opaque(w.shape(node)[-1])], lambda t: t.squeeze(-1)
    )
    if any(padding) and out.value is not None:
        out = replace(out, known=out.mask() & (out.value == 0))
    return out


# ---- reductions, pooling, interpolation


@rule("mean", "sum", "amax", "amin", "argmax", "argmin", "var", "std", "var_mean", "std_mean", "any", "all",
      "logsumexp", "linalg_vector_norm", "norm", "prod", "nansum", "median", "topk", "sort", "argsort", "kthvalue",
      "count_nonzero")  # fmt: skip
def reduction(w: Walk, node: Any) -> Any:
    x = w.val(node.args[0])
    name = kind(node)
    names = [a.name for a in node.target._schema.arguments]
    rank = len(x.axes)
    last = -1 if name in ("sort", "argsort", "topk", "kthvalue") else None
    dims = argument(node, names.index("dim"), "dim", last) if "dim" in names else None
    dims = list(range(rank)) if dims is None or dims == [] else dims if isinstance(dims, list | tuple) else [dims]
    dims = sorted({d % rank for d in dims}) if rank else []
    if name == "sum" and sum(carries(x.axes[d]) for d in dims) == 1 and isinstance(node.meta["val"], Tensor):
        d = next(d for d in dims if carries(x.axes[d]))
        x, columns = w.merged(node, x, d)
        if columns is not None:
            if w.facts:
                zero = _zero(x).transpose(0, d).reshape(len(columns), -1).all(1).numpy()
                w.readers.append(Reader(node, None, columns[None], ~zero[None, None]))
            x = Val((*x.axes[:d], opaque(len(columns)), *x.axes[d + 1 :]))
    x = w.blur(node, x, dims, "a reduction over it")
    result, shape = node.meta["val"], w.shape(node)
    if name in ("sort", "argsort", "topk", "kthvalue") and len(shape) == rank:
        changed = tuple(opaque(shape[d]) if d in dims else a for d, a in enumerate(x.axes))
        return [Val(changed)] * 2
    axes = tuple(() if d in dims else a for d, a in enumerate(x.axes) if len(shape) == rank or d not in dims)
    if isinstance(result, list | tuple):
        return [Val(axes)] * len(result)
    if x.value is None or name not in ("mean", "sum", "amax", "amin", "max", "min"):
        return Val(axes)
    known = x.inner()
    if name == "sum":
        known = known & (x.value == 0)
    lengths = [length(a) for a in axes]
    return settled(axes, known.reshape(lengths), x.value.reshape(lengths))


@rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
      "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
      "max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices", "_adaptive_avg_pool2d",
      "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d",
      "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
      "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_upsample_nearest_exact3d")  # fmt: skip
def resample(w: Walk, node: Any) -> Any:
    x = w.val(node.args[0])
    name = kind(node)
    result, shape = node.meta["val"], w.shape(node)
    space = int(re.search(r"(\d)d", name)[1])  # type: ignore[index]
    rank = len(x.axes)
    x = w.blur(node, x, list(range(rank - space, rank)), "space of a pooling")
    axes = (*x.axes[: rank - space], *(opaque(s) for s in shape[rank - space :]))
    known, value = x.mask(), x.value
    if value is None:
        out = Val(axes)
    else:
        border = None
        if x.border is not None:
            known = known & ~x.border
        if name.startswith("avg_pool"):
            padding: Any = argument(node, 3, "padding", 0)
            padded = any(padding) if isinstance(padding, list | tuple) else bool(padding)
            counted = padded and argument(node, 5, "count_include_pad", True)
            if counted or argument(node, 6, "divisor_override") is not None:
                border = known & (value != 0)  # every channel is averaged with the same zeros
        out = settled(axes, known, value, border)
    return [out, Val(axes)] if isinstance(result, list | tuple) else out


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax")
def softmax(w: Walk, node: Any) -> Val:
    x = w.val(node.args[0])
    d = argument(node, 1, "dim") % len(x.axes)
    x = w.blur(node, x, [d], "softmax over it")
    return Val(x.axes, sums=d == len(x.axes) - 1 and "log" not in kind(node))


@rule("cumsum", "cumprod", "logcumsumexp", "diff", "tril", "triu", "gather")
def scanned(w: Walk, node: Any) -> Any:
    x = w.val(node.args[0])
    name = kind(node)
    dims = [-2, -1] if name in ("tril", "triu") else [argument(node, 1, "dim", -1)]
    if name in ("diff", "gather"):
        for value in node.all_input_nodes:
            w.pin(node, value, "positions matter")
        return w.unknown(node)
    x = w.blur(node, x, [d % len(x.axes) for d in dims] if x.axes else [], "positions along it matter")
    return Val(x.axes)


# ---- normalization


@rule(
    "batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm", "_batch_norm_no_update", "instance_norm"
)
def batch_norm(w: Walk, node: Any) -> Any:
    x = w.val(node.args[0])
    name = kind(node)
    legit = name == "_native_batch_norm_legit_no_training"
    parameters = [None if a is None else w.val(a) for a in node.args[1:5]]
    axis = w.join(node, [x.axes[1], *(p.axes[0] for p in parameters if p is not None)])
    x = w.relayout(x, 1, axis)
    use_input = bool(node.args[5]) if not legit else False
    instance = name == "instance_norm"
    out = Val(x.axes)
    if instance:
        x = w.blur(node, x, list(range(2, len(x.axes))), "statistics over it")
    if w.facts and (instance or not use_input):
        gain, shift, mean, var = (None if p is None else p.value for p in parameters)
        eps = node.args[7 if not legit else 6]
        if all(p is None or p.known is True for p in parameters) and carries(axis):
            column = [1, -1] + [1] * (len(x.axes) - 2)
            known = x.inner()
            value = torch.zeros([1] * len(x.axes)).double() if x.value is None else x.value.double()
            if instance and use_input:
                value = torch.zeros_like(value)
            elif mean is not None and var is not None:
                value = (value - mean.double().view(column)) / (var.double().view(column) + eps).sqrt()
            else:
                return out
            if gain is not None:
                zero = gain == 0
                if bool(zero.any()):
                    known = known | zero.view(column)
                value = value * gain.double().view(column)
                value = torch.where(zero.view(column), 0, value)
            if shift is not None:
                value = value + shift.double().view(column)
            out = settled(x.axes, known, torch.where(known, value, 0))
    return [out, *(Val((axis,)) for _ in node.meta["val"][1:])] if isinstance(node.meta["val"], list | tuple) else out


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm", "group_norm", "native_group_norm")
def mixing_norm(w: Walk, node: Any) -> Any:
    x = w.val(node.args[0])
    name = kind(node)
    dims = list(range(1 if "group" in name else len(x.axes) - len(node.args[1]), len(x.axes)))
    why = "normalized together, removal would change the statistics"
    x = w.blur(node, x, dims, why)
    for p in node.all_input_nodes[1:]:
        w.pin(node, p, why)
    out = Val(x.axes)
    return [out, *w.unknown(node)[1:]] if isinstance(node.meta["val"], list | tuple) else out


# ---- contractions


def _constants(x: Val, d: int, n: int) -> tuple[Mask, Floats, Mask]:
    """What is known of each of n columns along axis d whatever the other indices: known, value, bordered."""
    if x.known is False or x.value is None:
        return np.zeros(n, bool), np.zeros(n), np.zeros(n, bool)
    lengths = [length(a) for a in x.axes]

    def columns(t: Tensor) -> Tensor:
        return t.expand(lengths).movedim(d, -1).reshape(-1, lengths[d])

    value = columns(x.value).double()
    fixed = columns(x.mask()).all(0) & (value == value[0]).all(0) & value[0].isfinite()
    border = torch.zeros_like(fixed) if x.border is None else columns(x.border).any(0)
    return fixed.expand(n).numpy(), value[0].expand(n).numpy(), border.expand(n).numpy()


def contract(
    w: Walk, node: Any, x: Val, d: int, weight: Val, table: Tensor | None, rows: Vector | None, columns: Vector | None,
    *, groups: int, counts: tuple[int, int], folds: bool, bias: Val | None, at: Any,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Record a contraction with a known weight; returns what is known of the output rows, and their values.

    Args:
        table: the weight as a view [groups, rows, columns, taps], None without facts.
        rows, columns: ids of outputs and inputs, None where they carry none.
        counts: outputs and inputs per group.
        at: position of the bias argument or its node, -1 where the operator has none.
    """
    m, n = counts
    name, key, free = weight.source, None, False
    if name is not None:
        key = (str(node.target), *(None if v is None else v.tobytes() for v in w.parameters[name]))
        free = w.uses[name] == 1
    if columns is None:
        columns = w.ids.fresh(groups * n)
    if rows is None:
        rows = w.ids.fresh(groups * m)
        w.pin(node, rows, "a single output")
    ids = rows.reshape(groups, m), columns.reshape(groups, n)
    reader = Reader(node, *ids, np.zeros((0, 0, 0), bool), source=name, bias=at, key=key)
    if table is None:
        if not w.facts:
            w.readers.append(reader)
        return None
    w.readers.append(reader)
    used = (table != 0).any(-1).numpy() if table.shape[-1] != 1 else (table.squeeze(-1) != 0).numpy()
    facts = _constants(x, d, groups * n)
    known, value, border = facts[0].reshape(groups, n), facts[1].reshape(groups, n), facts[2].reshape(groups, n)
    zero = known & (value == 0)
    uniform, bordered = known & ~zero & ~border, known & border
    inside = uniform if folds else np.zeros_like(uniform)
    merges = (bordered if folds or not uniform.any() else uniform) & free  # only constants of one shape merge
    reader.used, reader.soft, reader.folds, reader.merges = used, zero | inside | merges, inside, merges
    reader.constant, reader.table = np.where(known, value, np.nan), table
    certain = torch.from_numpy(~(used & ~(zero | inside)[:, None, :]).any(-1)).reshape(-1)
    if not certain.any():
        return None
    total = torch.zeros(groups * m).double()
    if inside.any():
        for g in np.flatnonzero(inside.any(1)):
            columns_in = torch.from_numpy(np.flatnonzero(inside[g]))
            rows_in = torch.nonzero(certain[g * m : g * m + m]).squeeze(1)
            taps = table[g][rows_in][:, columns_in].double().sum(-1)
            total[rows_in + int(g) * m] = taps @ torch.from_numpy(value[g][inside[g]])
    if bias is not None:
        if bias.value is None:
            return None
        certain = certain & bias.mask().reshape(-1)
        total = total + bias.value.double().reshape(-1)
    return certain, total


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution")
def convolution(w: Walk, node: Any) -> Any:
    name = kind(node)
    x, weight = w.val(node.args[0]), w.val(node.args[1])
    bias = w.val(node.args[2]) if argument(node, 2, "bias") is not None else None
    generic = name == "convolution"
    transposed = "transpose" in name or (generic and bool(node.args[6]))
    at = 8 if generic else 6
    groups = argument(node, at, "groups", 1)
    padding: Any = argument(node, 4, "padding", 0)
    padded = padding not in (0, "valid") and (not isinstance(padding, list | tuple) or any(padding))
    space = len(weight.axes) - 2
    c = len(x.axes) - space - 1
    shape = w.shape(node.args[1])
    inputs, outputs = (shape[0], shape[1] * groups) if transposed else (shape[1] * groups, shape[0])
    n, m = inputs // groups, outputs // groups
    x = w.blur(node, x, [*range(c + 1, len(x.axes))], "space of a convolution")
    w.pin(node, weight, "kernel of a convolution", range(2, len(weight.axes)))
    x, columns = w.merged(node, x, c)
    own_in, own_out = (0, 1) if transposed else (1, 0)
    if groups == 1 or transposed:
        join = w.join(node, [x.axes[c], weight.axes[own_in]])
        columns = w.vector(node, join)
        x = w.relayout(x, c, join) if groups == 1 and carries(x.axes[c]) else x
    if groups > 1 and transposed:
        rows = w.ids.fresh(outputs) if outputs > 1 else None
    else:
        rows = w.vector(node, weight.axes[own_out])
    if groups > 1:
        if weight.source is None or w.uses.get(weight.source, 0) != 1 or columns is None or rows is None:
            why = "a grouped convolution whose weight is computed or used twice, or that reads an input"
            for what in (x.axes[c], weight, columns, rows):
                w.pin(node, what, why)
        elif n == m == 1:
            w.ids.unify(columns, rows)
        else:
            shapes = columns.reshape(groups, n), rows.reshape(groups, m)
            w.balances.append(Balance(node, *shapes, weight.source, transposed))
        if columns is not None and rows is not None:

            def regroup(kept: Any, columns: Vector = columns, rows: Vector = rows) -> None:
                left = kept.alive(columns).reshape(groups, n).any(1) | kept.alive(rows).reshape(groups, m).any(1)
                if len(node.args) > at:
                    node.update_arg(at, int(left.sum()))
                else:
                    node.update_kwarg("groups", int(left.sum()))

            w.edits.append(regroup)
    if bias is not None:
        axis = w.join(node, [((outputs, rows),) if rows is not None else (), bias.axes[0]])
        rows = axis[0][1] if axis else rows
        bias = w.relayout(bias, 0, axis)
    out_axis: Axis = opaque(outputs) if rows is None else ((outputs, rows),)
    w.aligned.append(([v for v in (rows, columns) if v is not None], groups > 1 and n == m == 1))
    table = None
    if w.facts and weight.known is True and weight.value is not None:
        v = weight.value
        table = v.reshape(groups, n, m, -1).transpose(1, 2) if transposed else v.reshape(groups, m, n, -1)
    known = contract(
        w, node, x, c, weight, table, rows, columns, groups=groups, counts=(m, n),
        folds=not padded and not transposed, bias=bias, at=2,
    )  # fmt: skip
    if table is None and w.facts:
        for what in (*weight.axes[:2], x.axes[c]):
            w.pin(node, what, "a weight that depends on the input")
    sizes = w.shape(node)
    axes = (*x.axes[:c], out_axis if outputs > 1 else (), *(opaque(s) for s in sizes[c + 1 :]))
    if known is None:
        return Val(axes)
    column = [-1] + [1] * space
    return settled(axes, known[0].view(column), torch.where(known[0], known[1], 0).view(column))


@rule("linear", "addmm", "mm", "matmul", "bmm", "mv", "baddbmm")
def matmul(w: Walk, node: Any) -> Any:
    name = kind(node)
    added = name in ("addmm", "baddbmm")
    first, second = (node.args[1], node.args[2]) if added else (node.args[0], node.args[1])
    a, b = w.val(first), w.val(second)
    extra = node.args[0] if added else argument(node, 2, "bias") if name == "linear" else None
    bias = None if extra is None else w.val(extra)
    source = b.source
    if name == "linear" and len(b.axes) == 2:
        b = moved(b, b.axes[::-1], lambda t: t.t())
    rank = len(w.shape(node))
    if len(b.axes) == 1:
        b = moved(b, (*b.axes, ()), lambda t: t.unsqueeze(-1))
        rank += 1
    left_vector = len(a.axes) == 1
    if left_vector:
        a = w.lead(a, 1)
        rank += 1
    a, b = w.flat(node, a, len(a.axes) - 1), w.flat(node, b, len(b.axes) - 2)
    k = w.join(node, [a.axes[-1], b.axes[-2]])
    a = w.relayout(a, len(a.axes) - 1, k) if a.axes[-1] else a
    columns = k[0][1] if k else None
    n_in = k[0][0] if k else 1
    known: tuple[Tensor, Tensor] | None = None
    batch: tuple[Axis, ...] = a.axes[:-2]
    weighted = (len(b.axes) == 2 and b.known is True) or (not w.facts and len(b.axes) == 2 and source is not None)
    if weighted:
        b, rows = w.merged(node, b, 1)
        n_out = size(b.axes[1])
        plain = bias is None or len(bias.axes) == 1
        if bias is not None and plain and bias.axes[0]:
            axis = w.join(node, [b.axes[1], bias.axes[0]])
            bias = w.relayout(bias, 0, axis)
            rows = axis[0][1]
        table = None if b.value is None else b.value.t().reshape(1, n_out, -1, 1)
        at = {"linear": 2, "addmm": 0}.get(name, -1)
        if not plain or (added and any(v != 1 for v in node.kwargs.values())):
            at = -1
        known = contract(
            w, node, a, len(a.axes) - 1, replace(b, source=source), table, rows, columns, groups=1,
            counts=(n_out, n_in), folds=True, bias=bias if plain else None, at=at,
        )  # fmt: skip
        if not plain or (at < 0 and added):
            known = None
        axes: list[Axis] = [*a.axes[:-1], b.axes[1]]
    else:
        b = w.relayout(b, len(b.axes) - 2, k) if b.axes[-2] else b
        if len(batch) != len(b.axes[:-2]) or batch:
            joined, _ = w.broadcast(node, [Val(batch), Val(b.axes[:-2])])
            batch = joined
        axes = [*batch, a.axes[-2], b.axes[-1]]
        if columns is not None and w.facts:
            product(w, node, a, b, batch, columns)
        passed = _passed(a, b, axes) if w.facts and bias is None else None
        if passed is not None:
            return _squeeze_matmul(passed, left_vector, len(w.shape(node)))
        if bias is not None:
            out, _ = w.broadcast(node, [Val(tuple(axes)), bias])
            axes = list(out)
    if weighted and bias is not None and len(bias.axes) > 1:
        axes = list(w.broadcast(node, [Val(tuple(axes)), bias])[0])
    out_val = Val(tuple(axes)) if known is None else settled(axes, known[0], torch.where(known[0], known[1], 0))
    return _squeeze_matmul(out_val, left_vector, len(w.shape(node)))


def _squeeze_matmul(val: Val, left_vector: bool, rank: int) -> Val:
    if left_vector:
        val = moved(val, (*val.axes[:-2], val.axes[-1]), lambda t: t.squeeze(-2))
    if len(val.axes) > rank:
        val = moved(val, val.axes[:-1], lambda t: t.squeeze(-1))
    return val


def _zero(val: Val) -> Tensor:
    shape = [length(a) for a in val.axes]
    return (torch.zeros((), dtype=torch.bool) if val.value is None else val.mask() & (val.value == 0)).expand(shape)


def product(w: Walk, node: Any, a: Val, b: Val, batch: Sequence[Axis], columns: Vector, shift: bool = False) -> None:
    """Record a product of two activations: a column that is zero in either is not needed.

    With `shift` (the product is the logits of a softmax over the rows of b), neither is one where b is uniform.
    """
    other = _zero(b).all(-1)
    if shift and b.value is not None:
        other = other | (b.mask() & (b.value == b.value[..., :1])).all(-1)
    pair(w, node, _zero(a).all(-2) | other, batch, columns)


def pair(w: Walk, node: Any, spare: Tensor, batch: Sequence[Axis], columns: Vector) -> None:
    """Record a reader that needs its columns except where they are `spare` [*batch, columns]."""
    lengths = [length(x) for x in batch]
    need = ~spare.expand(*lengths, len(columns))
    gates = [i for i, s in enumerate(lengths) if s > 1]
    carried = [ids for _, ids in batch[gates[0]] if ids is not None] if len(gates) == 1 else []
    # what is opaque beside them, batch, may be free
    rows = functools.reduce(w.ids.product, carried) if carried else None
    if rows is not None:
        w.readers.append(Reader(node, rows[None], columns[None], need.reshape(1, len(rows), -1).numpy()))
    else:
        w.readers.append(Reader(node, None, columns[None], need.reshape(-1, len(columns)).any(0)[None, None].numpy()))


@rule("einsum")
def einsum(w: Walk, node: Any) -> Any:
    """Two operands and one contracted label; what is known does not pass, zeros are not needed."""
    terms = str(node.args[0]).replace(" ", "").replace("->", ",").split(",")
    if len(node.args[1]) != 2 or len(terms) != 3 or "." in node.args[0] or any(len(set(t)) < len(t) for t in terms):
        return w.refuse(node)
    left, right, out = terms
    inner = [c for c in left if c in right and c not in out]
    if len(inner) != 1 or set(left) ^ set(right) > set(out) | set(inner):
        return w.refuse(node)
    a, b = (w.val(n) for n in node.args[1])
    axes: dict[str, Axis] = {}
    for c in {*left, *right}:
        shared = [v.axes[t.index(c)] for v, t in ((a, left), (b, right)) if c in t]
        axes[c] = w.join(node, shared)
        if len(shared) == 2:
            a = w.relayout(a, left.index(c), axes[c]) if a.axes[left.index(c)] else a
            b = w.relayout(b, right.index(c), axes[c]) if b.axes[right.index(c)] else b
    batch = [c for c in left if c in right and c in out]
    columns = w.vector(node, axes[inner[0]])
    if columns is not None and w.facts:
        spare = [_labelled(v, t, [*batch, *inner]) for v, t in ((a, left), (b, right))]
        pair(w, node, spare[0] | spare[1], [axes[c] for c in batch], columns)
    return Val(tuple(axes[c] for c in out))


def _labelled(val: Val, labels: str, keep: list[str]) -> Tensor:
    """Where a value is zero whatever the labels that are not kept; axes in the order of `keep`."""
    zero = _zero(val).permute([labels.index(c) for c in keep] + [i for i, c in enumerate(labels) if c not in keep])
    return zero.reshape(*zero.shape[: len(keep)], -1).all(-1)


def _passed(a: Val, b: Val, axes: Sequence[Axis]) -> Val | None:
    """Constants that pass a product with weights that sum to one, and zeros."""
    if b.value is None:
        return None
    if (b.axes[-2] and carries(b.axes[-2])) or b.border is not None:
        return None
    mask = b.mask() if a.sums else b.mask() & (b.value == 0)
    return settled(axes, mask, b.value)


@rule("scaled_dot_product_attention")
def attention(w: Walk, node: Any) -> Any:
    q, k, v = (w.val(n) for n in node.args[:3])
    mask = argument(node, 3, "attn_mask")
    gqa = bool(node.kwargs.get("enable_gqa", False))
    rank = len(q.axes)
    batch: list[Axis] = []
    for d in range(rank - 2):
        if gqa and d == rank - 3:
            (q, many), (one, _), (two, _) = (w.merged(node, t, d) for t in (q, k, v))
            few = w.join(node, [one.axes[d], two.axes[d]])
            if many is not None and few and few[0][1] is not None and len(many) % len(few[0][1]) == 0:
                w.ids.unify(w.ids.split(many, len(few[0][1]))[0], few[0][1])
            else:
                for t in (q, one, two):
                    w.pin(node, t.axes[d], "grouped-query heads")
            batch.append(q.axes[d])
            continue
        batch.append(w.join(node, [t.axes[d] for t in (q, k, v)]))
    q, k, v = (w.flat(node, t, rank - 1) for t in (q, k, v))
    w.join(node, [q.axes[-1], k.axes[-1]])
    q, k, v = (w.blur(node, t, [rank - 2], "positions of an attention") for t in (q, k, v))
    if mask is not None:
        m = w.val(mask)
        w.pin(node, m, "the last axes of an attention mask", [-1, -2])
        if len(m.axes) > 2:
            w.broadcast(node, [Val(tuple(batch[-(len(m.axes) - 2) :])), Val(m.axes[:-2])])
    columns = q.axes[-1][0][1] if q.axes[-1] else None
    embed = w.shape(node.args[0])[-1]
    if columns is not None:
        if node.kwargs.get("scale") is None:
            w.edits.append(lambda kept: node.update_kwarg("scale", 1.0 / math.sqrt(embed)))
        if w.facts:
            if gqa:
                spare = [_zero(t).reshape(-1, len(columns)).all(0) for t in (q, k)]
                w.readers.append(Reader(node, None, columns[None], ~(spare[0] | spare[1]).numpy()[None, None]))
            else:
                turned = moved(k, (*k.axes[:-2], k.axes[-1], k.axes[-2]), lambda t: t.transpose(-1, -2))
                product(w, node, q, turned, batch, columns, shift=True)
    axes = (*batch, q.axes[-2], v.axes[-1])
    if v.value is None or gqa or argument(node, 4, "dropout_p", 0.0):
        return Val(axes)
    known = v.mask() if mask is None else v.mask() & (v.value == 0)
    return settled(axes, known, v.value)


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(w: Walk, node: Any) -> Any:
    """Inputs and projections are contractions; the hidden units are pinned, since they feed themselves."""
    if not isinstance(node.args[3], bool):  # packed sequences
        return w.refuse(node)
    x = w.val(node.args[0])
    weights: Any = node.args[2]
    biased, bidirectional = node.args[3], node.args[7]
    step = len(weights) // (node.args[4] * (2 if bidirectional else 1))
    for n in node.all_input_nodes:
        if n is not node.args[0] and n not in (weights[0], weights[step * bidirectional]):
            w.pin(node, n, "hidden units of a recurrent layer")
    x = w.flat(node, x, len(x.axes) - 1)
    for i in [0, step] if bidirectional else [0]:
        weight, bias = w.val(weights[i]), w.val(weights[i + 2]) if biased else None
        w.pin(node, weight.axes[0], "hidden units of a recurrent layer")
        axis = w.join(node, [x.axes[-1], weight.axes[1]])
        x = w.relayout(x, len(x.axes) - 1, axis) if x.axes[-1] else x
        columns, rows = axis[0][1] if axis else None, weight.axes[0][0][1]
        table = None if weight.value is None else weight.value.unsqueeze(0).unsqueeze(-1)
        name = "" if bias is None or bias.source is None else bias.source
        own = w.uses.get(name) == 1 and sum(v is w.parameters[name] for v in w.parameters.values()) == 1
        contract(
            w, node, x, len(x.axes) - 1, replace(weight, source=None), table, rows, columns, groups=1,
            counts=tuple(w.shape(weights[i])), folds=own, bias=bias, at=weights[i + 2] if own else -1,
        )  # fmt: skip
    return w.unknown(node)
