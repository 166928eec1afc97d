"""Operators rewritten before torch translates them, where its translation is slow, wrong or missing."""

from __future__ import annotations

import contextlib
import functools
import math

import torch
from torch import fx

from fxprune.errors import FinalizeError
from fxprune.graph.editing import erase_dead
from fxprune.graph.expressions import evaluate

aten = torch.ops.aten


def lower(module: fx.GraphModule, opset: int | None) -> None:
    """Rewrite the graph of a module in place, for a file of an opset; it computes the same."""
    attention = functools.partial(_attention, native=(opset or 0) >= 23)
    for target, rewrite in ((aten.scaled_dot_product_attention.default, attention), (aten.linear.default, _linear)):
        for node in module.graph.find_nodes(op="call_function", target=target):
            with module.graph.inserting_before(node):
                result = rewrite(module, node, *node.args, **node.kwargs)
            if result is not None:
                result.meta = node.meta
                node.replace_all_uses_with(result)
    erase_dead(module.graph)
    module.recompile()


def _attention(
    module: fx.GraphModule, node: fx.Node, q: fx.Node, k: fx.Node, v: fx.Node, mask: fx.Node | None = None,
    dropout: float = 0.0, causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False, native: bool,
) -> fx.Node | None:  # fmt: skip
    """Attention as products and a softmax, of any rank, without a mask that hides nothing.

    torch translates operands of four axes alone, and with copies of the keys and a guard of each softmax: 3 % of a
    ViT-B. There a row that a boolean mask empties becomes a mean, where eager gives zeros. From opset 23 on, ONNX has
    an operator for it.
    """
    call, value, shape = module.graph.call_function, q.meta["val"], q.meta["val"].shape
    if dropout or (native and len(shape) == 4):
        return None
    if enable_gqa and (times := shape[-3] // k.meta["val"].shape[-3]) > 1:
        sizes = [-1] * (len(shape) - 2) + [times, -1, -1]
        wide = [call(aten.expand.default, (call(aten.unsqueeze.default, (n, -3)), sizes)) for n in (k, v)]
        k, v = (call(aten.flatten.using_ints, (n, -4, -3)) for n in wide)
    scaled = call(aten.mul.Scalar, (q, 1 / math.sqrt(shape[-1]) if scale is None else scale))
    logits = call(aten.matmul.default, (scaled, call(aten.transpose.int, (k, -2, -1))))
    static = _constant(module, mask)
    if causal:
        rows, columns = (call(aten.arange.default, (call(aten.sym_size.int, (n, -2)),)) for n in (q, k))
        mask = call(aten.le.Tensor, (columns, call(aten.unsqueeze.default, (rows, -1))))
    elif static is not None and not (~static if static.dtype == torch.bool else static).any():
        mask = None
    empty = None
    if mask is not None:
        if boolean := causal or mask.meta["val"].dtype == torch.bool:
            hidden = call(aten.logical_not.default, (mask,))
            lowest = torch.finfo(value.dtype).min
            bias = call(aten.mul.Scalar, (call(aten.to.dtype, (hidden, value.dtype)), lowest))
        else:
            hidden, bias = call(aten.eq.Scalar, (mask, -math.inf)), mask
        logits = call(aten.add.Tensor, (logits, bias))
        if not causal and (static is None or (~static if boolean else static == -math.inf).all(-1).any()):
            empty = call(aten.all.dim, (hidden, -1, True))
    result = call(aten.matmul.default, (call(aten.softmax.int, (logits, -1)), v))
    return result if empty is None else call(aten.masked_fill.Scalar, (result, empty, 0.0))


def _constant(module: fx.GraphModule, node: fx.Node | None) -> torch.Tensor | None:
    """The value of what depends on no input, but for expansions to a free batch."""
    while node is not None and node.target is aten.expand.default:
        node = node.args[0]  # type: ignore[assignment]
    with contextlib.suppress(FinalizeError):
        return None if node is None else evaluate(module, node)
    return None


def _linear(
    module: fx.GraphModule, node: fx.Node, data: fx.Node, weight: fx.Node, bias: fx.Node | None = None
) -> fx.Node | None:
    """Let linear layers act on matrices: onnxruntime joins a product and its bias for these alone, 2 % of a ViT-B.

    A shape with more than one free size is left alone, since a single one can be inferred.
    """
    call = module.graph.call_function
    shape = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
    if bias is None or len(shape) < 3 or shape.count(-1) > 1:
        return None
    rows = call(aten.reshape.default, (data, [-1, data.meta["val"].shape[-1]]))
    product = call(aten.linear.default, (rows, weight, bias))
    return call(aten.reshape.default, (product, shape))
