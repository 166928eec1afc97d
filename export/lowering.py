"""Operators rewritten before torch translates them, where its translation is slow, wrong or missing."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from fxprune.channels.arguments import bound, set_argument
from fxprune.errors import FinalizeError
from fxprune.export.exact_numbers import has_rounded_numbers, with_tensors
from fxprune.export.free_groups import CONVOLUTIONS, as_products, has_free_groups
from fxprune.export.large_integers import SUMS, as_product_with_ones, as_squares, is_power, may_be_large
from fxprune.export.projections import is_projected, replace_projected
from fxprune.export.running_extremes import RUNNING, is_running, replace_running
from fxprune.graph.editing import erase_dead
from fxprune.graph.expressions import evaluate

aten = torch.ops.aten
_LITTLE = 1e-6


def lower(module: fx.GraphModule, opset: int | None) -> None:
    """Rewrite the graph of a module in place, for a file of an opset; it computes the same."""
    graph = module.graph
    # these ask what steps are in values, which steps that are put in do not have
    _rewrite(graph, filter(_moves_complex, list(graph.nodes)), _move_parts)
    _rewrite(graph, filter(_is_of_free_size, _calls(graph, *_PARTS)), _write_as_slices)
    for node in _calls(graph, aten.cat.default):
        _leave_out_empty(node)
    for node in _calls(graph, aten.scaled_dot_product_attention.default):
        attention = _Attention.of(node)
        if attention.is_of_nothing:
            with graph.inserting_before(node):
                _replace(node, _nothing(graph, attention))
        elif not attention.dropout and not (attention.rank == 4 and opset is not None and opset >= 23):
            with graph.inserting_before(node):
                _replace(node, _as_products(module, attention))
    _rewrite(graph, filter(has_free_groups, _calls(graph, *CONVOLUTIONS)), as_products)
    _rewrite(graph, _calls(graph, aten.linear.default), _on_matrices)
    _rewrite(graph, filter(is_projected, _calls(graph, aten.lstm.input)), replace_projected)
    _rewrite(graph, filter(_is_of_other_type, _calls(graph, aten.rsub.Scalar)), _as_sum)
    _rewrite(graph, filter(_adds_little, _calls(graph, aten.add.Tensor)), _give_an_axis)
    _rewrite(graph, filter(_is_uneven, _calls(graph, *_LARGEST)), _write_as_largest)
    for node in _calls(graph, *_OF_ALL):
        node.target = _OF_ALL[node.target]
    _rewrite(graph, filter(_is_truth, _calls(graph, *_CHOICES)), _as_logic)
    for node in _calls(graph, *_SQUEEZES):
        with graph.inserting_before(node):
            node.replace_all_uses_with(_without_others(graph, node))
    _rewrite(graph, filter(may_be_large, _calls(graph, *SUMS)), as_product_with_ones)
    _rewrite(graph, filter(is_power, _calls(graph, aten.pow.Tensor_Scalar)), as_squares)
    _rewrite(graph, filter(is_running, _calls(graph, *RUNNING)), replace_running)
    inverses: dict[Any, fx.Node] = {}
    systems = filter(_is_of_known_size, _calls(graph, aten.linalg_solve_triangular.default))
    _rewrite(graph, systems, lambda graph, node: _solved(graph, node, inverses))
    _rewrite(graph, filter(has_rounded_numbers, list(graph.nodes)), with_tensors)
    erase_dead(graph)
    module.recompile()


def _calls(graph: fx.Graph, *targets: Any) -> list[fx.Node]:
    """The nodes that call one of some operators."""
    return [node for target in targets for node in graph.find_nodes(op="call_function", target=target)]


def _rewrite(graph: fx.Graph, nodes: Iterable[fx.Node], write: Callable[[fx.Graph, fx.Node], fx.Node | None]) -> None:
    """Write other steps before each of some nodes; what is returned takes its place."""
    for node in nodes:
        with graph.inserting_before(node):
            result = write(graph, node)
        if result is not None:
            _replace(node, result)


def _replace(node: fx.Node, result: fx.Node) -> None:
    result.meta = node.meta
    node.replace_all_uses_with(result)


# ---- differences


def _is_of_other_type(node: fx.Node) -> bool:
    return bool(node.meta["val"].dtype != node.args[0].meta["val"].dtype)  # type: ignore[union-attr]


def _as_sum(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A fraction less a tensor of whole numbers: torch's translation takes the fraction for a tensor."""
    data, number, *rest = node.args
    times = rest[0] if rest else node.kwargs.get("alpha", 1)
    data = graph.call_function(aten.to.dtype, (data, node.meta["val"].dtype))
    if times != 1:
        data = graph.call_function(aten.mul.Scalar, (data, times))
    return graph.call_function(aten.add.Scalar, (graph.call_function(aten.neg.default, (data,)), number))


def _adds_little(node: fx.Node) -> bool:
    """Whether a number next to zero is added, which torch's translation takes for zero unless it has an axis."""
    number = node.args[1]
    return isinstance(number, float) and 0 < abs(number) < _LITTLE and node.meta["val"].dim() > 0


def _give_an_axis(graph: fx.Graph, node: fx.Node) -> None:
    node.update_arg(1, graph.call_function(aten.full.default, ([1], node.args[1]), {"dtype": node.meta["val"].dtype}))


# ---- truth values

_OF_ALL: dict[Any, Any] = {aten._is_all_true.default: aten.all.default, aten._is_any_true.default: aten.any.default}
_FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_CHOICES = (*_FILLS, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)


def _is_truth(node: fx.Node) -> bool:
    return bool(node.meta["val"].dtype == torch.bool)


def _as_logic(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A choice among truth values, for which onnxruntime has no kernel of `Where`."""
    condition, chosen, other = node.args
    if node.target in _FILLS:
        other, condition, chosen = node.args
    condition, chosen, other = (_as_truth(graph, operand) for operand in (condition, chosen, other))

    def both(one: Any, another: Any) -> fx.Node:
        return graph.call_function(aten.logical_and.default, (one, another))

    def either(one: Any, another: Any) -> fx.Node:
        return graph.call_function(aten.logical_or.default, (one, another))

    def negated(one: Any) -> fx.Node:
        return graph.call_function(aten.logical_not.default, (one,))

    if isinstance(chosen, bool) and isinstance(other, bool):
        other = graph.call_function(aten.full_like.default, (condition, other))
    if isinstance(chosen, bool):
        return either(condition, other) if chosen else both(negated(condition), other)
    if isinstance(other, bool):
        return either(negated(condition), chosen) if other else both(condition, chosen)
    return either(both(condition, chosen), both(negated(condition), other))


def _as_truth(graph: fx.Graph, operand: Any) -> fx.Node | bool:
    """An operand as a truth value, or a tensor of them."""
    if not isinstance(operand, fx.Node):
        return bool(operand)
    value = operand.meta["val"]
    if not isinstance(value, torch.Tensor):  # a size
        operand = graph.call_function(aten.scalar_tensor.default, (operand,))
    elif value.dtype == torch.bool:
        return operand
    return graph.call_function(aten.ne.Scalar, (operand, 0))


# ---- complex numbers

# operators that move numbers, which torch cannot write of complex ones: by operator, the argument that names an axis,
# or says what becomes of each
_COMPLEX_MOVES: dict[Any, tuple[str, ...]] = {
    aten.alias.default: (), aten.chunk.default: ("dim",), aten.contiguous.default: (), aten.detach.default: (),
    aten.expand.default: ("size",), aten.flatten.using_ints: ("start_dim", "end_dim"), aten.index.Tensor: (),
    aten.index_select.default: ("dim",), aten.repeat.default: ("repeats",), aten.reshape.default: ("shape",),
    aten.select.int: ("dim",), aten.split.Tensor: ("dim",), aten.split_with_sizes.default: ("dim",),
    aten.squeeze.default: (), aten.squeeze.dim: ("dim",), aten.squeeze.dims: ("dim",), aten.unbind.int: ("dim",),
    aten.unflatten.int: ("dim",), aten.unsqueeze.default: ("dim",),
}  # fmt: skip
_OF_PARTS = {"size": -1, "repeats": 1, "shape": 2}  # what becomes of the axis of both parts, the last


def _moves_complex(node: fx.Node) -> bool:
    return node.target in _COMPLEX_MOVES and node.all_input_nodes[0].meta["val"].is_complex()


def _move_parts(graph: fx.Graph, node: fx.Node) -> None:
    """Move the real and the imaginary parts of complex numbers together, as one real tensor with an axis more."""

    def real(value: Any) -> Any:
        return pytree.tree_map_only(torch.Tensor, torch.view_as_real, value)

    def numbers(parts: fx.Node, meta: dict[str, Any]) -> fx.Node:
        made = graph.call_function(aten.view_as_complex.default, (parts,))
        made.meta = meta
        return made

    data = node.all_input_nodes[0]
    parts = graph.call_function(aten.view_as_real.default, (data,))
    parts.meta["val"] = real(data.meta["val"])
    moved = graph.create_node("call_function", node.target, (parts, *node.args[1:]), node.kwargs)
    moved.meta["val"] = real(node.meta["val"])
    rank = data.meta["val"].dim() + (node.target is aten.unsqueeze.default)
    arguments = bound(node)
    for name in _COMPLEX_MOVES[node.target]:
        given = arguments[name]
        if name in _OF_PARTS:
            set_argument(moved, name, [*given, _OF_PARTS[name]])
        else:
            set_argument(
                moved, name, [dim % rank for dim in given] if isinstance(given, list | tuple) else given % rank
            )
    if isinstance(node.meta["val"], torch.Tensor):
        node.replace_all_uses_with(numbers(moved, node.meta))
        return
    for item in list(node.users):
        part = graph.call_function(operator.getitem, (moved, item.args[1]))
        part.meta["val"] = real(item.meta["val"])
        item.replace_all_uses_with(numbers(part, item.meta))


# ---- parts of an axis


_PARTS = (aten.chunk.default, aten.split.Tensor)


def _is_of_free_size(node: fx.Node) -> bool:
    """Whether the size of the axis that is cut is free: of such parts torch makes a sequence, and cannot."""
    given = bound(node)
    return not isinstance(given["self"].meta["val"].shape[given["dim"]], int)


def _write_as_slices(graph: fx.Graph, node: fx.Node) -> None:
    """Parts as slices: each begins where the one before ends, and the last ends where the axis does."""
    given, call = bound(node), graph.call_function
    data, dim, longest = given["self"], given["dim"], given.get("split_size")
    if longest is None:
        size, count = call(aten.sym_size.int, (data, dim)), given["chunks"]
        longest = call(operator.floordiv, (call(operator.add, (size, count - 1)), count))
    for item in list(node.users):
        place = item.args[1]
        begin, end = (call(operator.mul, (longest, i)) for i in (place, place + 1))  # type: ignore[operator]
        _replace(item, call(aten.slice.Tensor, (data, dim, begin, end)))


# ---- the largest of windows

_LARGEST = (aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default)


def _is_uneven(pool: fx.Node) -> bool:
    """Whether windows differ in size, or it is not known, which ONNX has no operator for; nothing reads the places."""
    data, counts = _pooled(pool)
    sizes = data.meta["val"].shape[-len(counts) :]
    even = (count == 1 or (isinstance(n, int) and n % count == 0) for n, count in zip(sizes, counts, strict=True))
    return not all(even) and all(item.args[1] == 0 for item in pool.users if item.users)


def _pooled(pool: fx.Node) -> tuple[fx.Node, list[int]]:
    data, counts = pool.args
    return data, [counts] if isinstance(counts, int) else list(counts)  # type: ignore[return-value, arg-type]


def _write_as_largest(graph: fx.Graph, pool: fx.Node) -> None:
    """The largest numbers of slices, one axis after the other: window i of k of n is from i n / k to (i + 1) n / k.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.AdaptiveMaxPool2d.html: begins are rounded down, ends up.
    """
    call = graph.call_function
    data, counts = _pooled(pool)
    shape = data.meta["val"].shape
    for dim, count in enumerate(counts, len(shape) - len(counts)):
        size = shape[dim] if isinstance(shape[dim], int) else call(aten.sym_size.int, (data, dim))
        largest = []
        for i in range(count):
            begin, end = _part(graph, size, i, count), _part(graph, size, i + 1, count, count - 1)
            window = call(aten.slice.Tensor, (data, dim, begin, end))
            largest.append(call(aten.amax.default, (window, [dim], True)))
        data = call(aten.cat.default, (largest, dim)) if count > 1 else largest[0]
    for item in [item for item in pool.users if item.args[1] == 0]:
        _replace(item, data)


def _part(graph: fx.Graph, size: Any, i: int, count: int, more: int = 0) -> Any:
    """(size i + more) // count, of a number or a node."""
    if isinstance(size, int):
        return (size * i + more) // count
    call = graph.call_function
    times = call(operator.mul, (size, i))
    return call(operator.floordiv, (call(operator.add, (times, more)), count))


# ---- parts of size zero


def _is_empty(node: fx.Node) -> bool:
    return any(isinstance(size, int) and size == 0 for size in node.meta["val"].shape)


def _leave_out_empty(cat: fx.Node) -> None:
    """What is empty adds nothing, and is read no longer: ONNX takes a size of zero in a shape for another one's."""
    parts: list[fx.Node] = list(cat.args[0])  # type: ignore[arg-type]
    left = [part for part in parts if not _is_empty(part)]
    if left and len(left) < len(parts) and len({part.meta["val"].dtype for part in parts}) == 1:
        cat.update_arg(0, left)


# ---- axes of size one

_SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)


def _without_others(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A squeeze of the axes that are of size one; of others, which torch leaves alone, ONNX makes an error.

    Where all are meant, ONNX would squeeze a batch of one, which the graph holds for one of any size.
    """
    data = node.args[0]
    assert isinstance(data, fx.Node)
    shape = data.meta["val"].shape
    named = node.args[1] if len(node.args) > 1 else range(len(shape))
    dims: list[int] = [named] if isinstance(named, int) else list(named)  # type: ignore[arg-type]
    asked = {dim % len(shape) for dim in dims} if shape else set()
    ones = sorted(dim for dim in asked if isinstance(shape[dim], int) and shape[dim] == 1)
    if not ones:
        return data
    squeezed = graph.call_function(aten.squeeze.dims, (data, ones))
    squeezed.meta = node.meta
    return squeezed


# ---- attention


@dataclass(frozen=True)
class _Attention:
    """A call of `scaled_dot_product_attention`: operands [..., heads, positions, features], and its options."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    dropout: float
    causal: bool
    scale: float
    heads_per_key: int

    @classmethod
    def of(cls, node: fx.Node) -> _Attention:
        def parse(
            query: fx.Node, key: fx.Node, value: fx.Node, attn_mask: fx.Node | None = None, dropout_p: float = 0.0,
            is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
        ) -> _Attention:  # fmt: skip
            shape = query.meta["val"].shape
            heads_per_key = shape[-3] // key.meta["val"].shape[-3] if enable_gqa else 1
            scale = 1 / math.sqrt(shape[-1]) if scale is None else scale
            return cls(query, key, value, attn_mask, dropout_p, is_causal, scale, heads_per_key)

        return parse(*node.args, **node.kwargs)  # type: ignore[arg-type]

    @property
    def rank(self) -> int:
        return len(self.query.meta["val"].shape)

    @property
    def is_of_nothing(self) -> bool:
        """Whether there are no keys, so that nothing is added up."""
        return _is_empty(self.key) and not _is_empty(self.query) and isinstance(self.features, int)

    @property
    def features(self) -> Any:
        return self.value.meta["val"].shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.query.meta["val"].dtype
        return dtype


@dataclass(frozen=True)
class _Mask:
    """What a mask does to the logits.

    Attributes:
        bias: what is added to them. empty: which rows nothing is left of [..., rows, 1], None where there are none.
    """

    bias: fx.Node
    empty: fx.Node | None


def _as_products(module: fx.GraphModule, attention: _Attention) -> fx.Node:
    """Attention as products and a softmax, of any rank, without a mask that hides nothing.

    torch translates operands of four axes alone, and with copies of the keys and a guard of each softmax: 3 % of a
    ViT-B. There a row that a boolean mask empties becomes a mean, where eager gives zeros. From opset 23 on, ONNX has
    an operator for it.
    """
    call = module.graph.call_function
    key, value = (_for_each_head(module.graph, operand, attention) for operand in (attention.key, attention.value))
    scaled = call(aten.mul.Scalar, (attention.query, attention.scale))
    logits = call(aten.matmul.default, (scaled, call(aten.transpose.int, (key, -2, -1))))
    mask = _causal_mask(module.graph, attention) if attention.causal else _given_mask(module, attention)
    if mask is not None:
        logits = call(aten.add.Tensor, (logits, mask.bias))
    result = call(aten.matmul.default, (call(aten.softmax.int, (logits, -1)), value))
    if mask is None or mask.empty is None:
        return result
    return call(aten.masked_fill.Scalar, (result, mask.empty, 0.0))


def _nothing(graph: fx.Graph, attention: _Attention) -> fx.Node:
    """Zeros, for every query as many as a value has."""
    call = graph.call_function
    zeros = call(aten.zeros_like.default, (call(aten.slice.Tensor, (attention.query, -1, 0, 1)),))
    return call(aten.expand.default, (zeros, [-1] * (attention.rank - 1) + [attention.features]))


def _for_each_head(graph: fx.Graph, operand: fx.Node, attention: _Attention) -> fx.Node:
    """Keys or values, one for each head of the queries."""
    if attention.heads_per_key == 1:
        return operand
    sizes = [-1] * (attention.rank - 2) + [attention.heads_per_key, -1, -1]
    repeated = graph.call_function(
        aten.expand.default, (graph.call_function(aten.unsqueeze.default, (operand, -3)), sizes)
    )
    return graph.call_function(aten.flatten.using_ints, (repeated, -4, -3))


def _causal_mask(graph: fx.Graph, attention: _Attention) -> _Mask:
    """A position sees itself and those before it, so that no row is empty."""
    call = graph.call_function
    rows, columns = (
        call(aten.arange.default, (call(aten.sym_size.int, (operand, -2)),))
        for operand in (attention.query, attention.key)
    )
    seen = call(aten.le.Tensor, (columns, call(aten.unsqueeze.default, (rows, -1))))
    return _Mask(_hiding(graph, call(aten.logical_not.default, (seen,)), attention.dtype), None)


def _given_mask(module: fx.GraphModule, attention: _Attention) -> _Mask | None:
    """The mask that the call has, boolean (true is seen) or added; None where there is none, or it hides nothing."""
    mask = attention.mask
    if mask is None:
        return None
    call = module.graph.call_function
    constant = _constant(module, mask)
    is_boolean = mask.meta["val"].dtype == torch.bool
    if constant is not None and not (~constant if is_boolean else constant).any():
        return None
    if is_boolean:
        hidden = call(aten.logical_not.default, (mask,))
        bias = _hiding(module.graph, hidden, attention.dtype)
    else:
        hidden, bias = call(aten.eq.Scalar, (mask, -math.inf)), mask
    if constant is not None and not (~constant if is_boolean else constant == -math.inf).all(-1).any():
        return _Mask(bias, None)
    return _Mask(bias, call(aten.all.dim, (hidden, -1, True)))


def _hiding(graph: fx.Graph, hidden: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The lowest number where `hidden` is true, zero elsewhere."""
    number = graph.call_function(aten.to.dtype, (hidden, dtype))
    return graph.call_function(aten.mul.Scalar, (number, torch.finfo(dtype).min))


def _constant(module: fx.GraphModule, node: fx.Node) -> torch.Tensor | None:
    """The value of what depends on no input, but for expansions to a free batch; None of what depends on one."""
    while node.target is aten.expand.default:
        (node, *_) = node.args  # type: ignore[assignment]
    try:
        return evaluate(module, node)
    except FinalizeError:
        return None


# ---- triangular systems


def _is_of_known_size(node: fx.Node) -> bool:
    return isinstance(node.args[0].meta["val"].shape[-1], int)  # type: ignore[union-attr]


def _solved(graph: fx.Graph, node: fx.Node, inverses: dict[Any, fx.Node]) -> fx.Node:
    """A product with the inverse of a triangular matrix, in the place of a solver, which ONNX has none of."""
    matrix, given = node.args[:2]
    options = {"upper": False, "left": True, "unitriangular": False} | node.kwargs
    key = matrix, options["upper"], options["unitriangular"]
    if key not in inverses:
        inverses[key] = _inverse(graph, *key)  # type: ignore[arg-type]
    operands = (inverses[key], given) if options["left"] else (given, inverses[key])
    return graph.call_function(aten.matmul.default, operands)


def _inverse(graph: fx.Graph, matrix: fx.Node, is_upper: bool, has_ones: bool) -> fx.Node:
    """That of a triangular matrix, of blocks on its diagonal that are twice as large at each step.

    That of [[A, 0], [B, C]] is [[A', 0], [-C' B A', C']]. It is as exact as substitution: N. J. Higham, Accuracy and
    Stability of Numerical Algorithms, 2002, section 14.2.
    """
    call, value = graph.call_function, matrix.meta["val"]
    size = value.shape[-1]
    inverse = call(aten.eye.default, (size,), {"dtype": value.dtype})
    if not has_ones:
        diagonal = call(aten.reciprocal.default, (call(aten.diagonal.default, (matrix, 0, -2, -1)),))
        inverse = call(aten.mul.Tensor, (inverse, call(aten.unsqueeze.default, (diagonal, -1))))
    places = call(aten.arange.default, (size,))
    for width in (2**step for step in range((size - 1).bit_length())):
        block = call(aten.floor_divide.default, (places, width))
        row, column = (call(aten.unsqueeze.default, (block, dim)) for dim in (-1, 0))
        first, second = (row, column) if is_upper else (column, row)  # of two that become one
        is_next = call(aten.eq.Scalar, (call(aten.sub.Tensor, (second, first)), 1))
        is_even = call(aten.eq.Scalar, (call(aten.remainder.Scalar, (first, 2)), 0))
        beside = call(aten.to.dtype, (call(aten.logical_and.default, (is_next, is_even)), value.dtype))
        product = call(aten.matmul.default, (inverse, call(aten.mul.Tensor, (matrix, beside))))
        inverse = call(aten.sub.Tensor, (inverse, call(aten.matmul.default, (product, inverse))))
    return inverse


# ---- linear layers


def _on_matrices(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Let a linear layer act on a matrix: onnxruntime joins a product and its bias for these alone, 2 % of a ViT-B.

    A shape with more than one free size is left alone, since a single one can be inferred, unless there is nothing.
    """
    shape = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
    data, weight, bias = (bound(node)[name] for name in ("input", "weight", "bias"))
    if bias is None or len(shape) < 3 or shape.count(-1) > 1 or 0 in shape:
        return None
    rows = graph.call_function(aten.reshape.default, (data, [-1, data.meta["val"].shape[-1]]))
    product = graph.call_function(aten.linear.default, (rows, weight, bias))
    return graph.call_function(aten.reshape.default, (product, shape))
