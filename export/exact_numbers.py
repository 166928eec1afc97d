"""Numbers beside float64 tensors, which torch's translation rounds to float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.numpy_helper
import torch
from onnxscript import opset18
from torch import fx

aten = torch.ops.aten
op: Any = opset18
_DOUBLE, _FLOAT = onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT
# of which complex numbers are two
_PARTS: dict[int, int] = {onnx.TensorProto.COMPLEX64: _FLOAT, onnx.TensorProto.COMPLEX128: _DOUBLE}

_OPERANDS, _CHOSEN = (0, 1), (1, 2)
# by operator, the one that takes tensors in the place of numbers, and where these stand
_OF_TENSORS: dict[Any, tuple[Any, tuple[int, ...]]] = {
    aten.add.Tensor: (aten.add.Tensor, _OPERANDS), aten.add.Scalar: (aten.add.Tensor, _OPERANDS),
    aten.sub.Tensor: (aten.sub.Tensor, _OPERANDS), aten.sub.Scalar: (aten.sub.Tensor, _OPERANDS),
    aten.rsub.Scalar: (aten.rsub.Tensor, _OPERANDS),
    aten.mul.Tensor: (aten.mul.Tensor, _OPERANDS), aten.mul.Scalar: (aten.mul.Tensor, _OPERANDS),
    aten.div.Tensor: (aten.div.Tensor, _OPERANDS), aten.div.Scalar: (aten.div.Tensor, _OPERANDS),
    aten.pow.Tensor_Scalar: (aten.pow.Tensor_Tensor, _OPERANDS), aten.pow.Scalar: (aten.pow.Tensor_Tensor, _OPERANDS),
    aten.masked_fill.Scalar: (aten.masked_fill.Tensor, (2,)), aten.where.Scalar: (aten.where.self, _CHOSEN),
    aten.where.ScalarOther: (aten.where.self, _CHOSEN), aten.where.ScalarSelf: (aten.where.self, _CHOSEN),
    aten.clamp.default: (aten.clamp.Tensor, _CHOSEN), aten.clamp_min.default: (aten.clamp_min.Tensor, (1,)),
    aten.clamp_max.default: (aten.clamp_max.Tensor, (1,)),
}  # fmt: skip
_FILLED = {aten.full.default: aten.expand.default, aten.full_like.default: aten.expand_as.default}


def scalar_tensor(s: Any, dtype: int = _FLOAT, layout: str = "", device: str = "", pin_memory: bool = False) -> Any:
    """A number as a tensor: torch's translation makes it of float32, and then of its type."""
    dtype = _FLOAT if dtype == -1 else dtype
    part = _PARTS.get(dtype, dtype)
    if part == _DOUBLE and isinstance(s, int | float):
        number = op.Constant(value=onnx.numpy_helper.from_array(np.array(s, np.float64)))
    else:
        number = op.Cast(s, to=part)
    if part == dtype:
        return number
    real = op.Unsqueeze(number, op.Constant(value_ints=[-1]))
    return op.Concat(real, op.Sub(real, real), axis=-1)


def has_rounded_numbers(node: fx.Node) -> bool:
    """Whether a call gives float64, and takes numbers that float32 cannot hold."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float64:
        return False
    if node.target in _FILLED:
        return _is_rounded(node.args[1])
    places = _OF_TENSORS[node.target][1] if node.target in _OF_TENSORS else ()
    return any(_is_rounded(argument) for place, argument in enumerate(node.args) if place in places)


def with_tensors(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The same call with tensors in the place of numbers."""
    if node.target in _FILLED:
        size, number = node.args[:2]
        return graph.call_function(_FILLED[node.target], (_as_tensor(graph, number), size))
    target, places = _OF_TENSORS[node.target]
    arguments = [_as_tensor(graph, a) if place in places else a for place, a in enumerate(node.args)]
    return graph.call_function(target, tuple(arguments), dict(node.kwargs))


def _is_rounded(argument: Any) -> bool:
    with np.errstate(over="ignore"):
        return isinstance(argument, float) and float(np.float32(argument)) != argument


def _as_tensor(graph: fx.Graph, argument: Any) -> Any:
    """A number as a tensor; what is none as it is."""
    if not isinstance(argument, int | float):
        return argument
    return graph.call_function(aten.scalar_tensor.default, (argument,), {"dtype": torch.float64})
