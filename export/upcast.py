"""Files of bfloat16, which onnxruntime does not compute on a CPU: verified by a twin in which all that is float32.

A bfloat16 number is a float32 number, so that weights stay what they are. Where the twin gives what the module gives
when it is computed in float32, graph and weights of the file are right; what a target rounds is left to the target.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch
import torch.utils._pytree as pytree
from onnx.shape_inference import InferenceError, infer_shapes
from torch import fx, nn

from fxprune.errors import ExportError
from fxprune.graph.equality import TOLERANCES
from fxprune.graph.traced import TracedModule
from fxprune.reports import number
from fxprune.torch_internals import OpOverload

from .float64 import UPCAST, WidenedRunner
from .report import Report
from .session import Session
from .wire import read

BFLOAT16, FLOAT = onnx_ir.DataType.BFLOAT16, onnx_ir.DataType.FLOAT
OPSET = 22  # the first whose convolutions and pools take bfloat16

aten = torch.ops.aten
# whose numbers are attributes in ONNX, in float32
_ATTRIBUTES = {aten.leaky_relu, aten.elu, aten.celu, aten.selu, aten.softplus, aten.softshrink, aten.hardshrink}


def holds_bfloat16(graph: fx.Graph) -> bool:
    """Whether a graph computes with tensors of bfloat16, or reads one."""
    return any(_is_bfloat16(node) for node in graph.nodes)


class Upcast(WidenedRunner):
    """A traced module of bfloat16 computed in float32, with its own weights.

    Numbers in its graph are those of the file: rounded to bfloat16, where they meet tensors of that.
    """

    def __init__(self, final: TracedModule, opset: int | None) -> None:
        self._opset = opset
        super().__init__(final, UPCAST)
        self.name = f"{self.name} in float32"

    def _copied(self, *, shared: bool) -> nn.Module:
        copied = super()._copied(shared=shared)
        assert isinstance(copied, TracedModule)
        has_operator = self._opset is not None and self._opset >= 23  # for attention, with its scale as an attribute
        for node in copied.graphs["eval"].nodes:
            if not _is_bfloat16(node) or not isinstance(node.target, OpOverload):
                continue
            if node.target is not aten.scaled_dot_product_attention.default:
                _round_numbers(node)
            elif not has_operator:
                _round_scale(node)
        copied.recompile()
        return copied


def _is_bfloat16(node: fx.Node) -> bool:
    values = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 for value in values)


def _rounded(value: float) -> float:
    return torch.tensor(value, dtype=torch.bfloat16).item()


def _round_numbers(node: fx.Node) -> None:
    assert isinstance(node.target, OpOverload)
    if node.target.overloadpacket in _ATTRIBUTES:
        return
    for i, own in enumerate(node.target._schema.arguments):
        value = node.args[i] if i < len(node.args) else node.kwargs.get(own.name)
        if isinstance(value, float) and str(own.type) in ("number", "Tensor", "Optional[number]"):
            if i < len(node.args):
                node.update_arg(i, _rounded(value))
            else:
                node.update_kwarg(own.name, _rounded(value))


def _round_scale(attention: fx.Node) -> None:
    query, scale = attention.args[0], attention.kwargs.get("scale")
    scale = query.meta["val"].shape[-1] ** -0.5 if scale is None else scale  # type: ignore[union-attr]
    attention.update_kwarg("scale", _rounded(scale))  # type: ignore[arg-type]


class Twin(Session):
    """A file of bfloat16 in float32, run on inputs of bfloat16."""

    def __init__(self, path: Path, providers: tuple[str, ...], name: str) -> None:
        super().__init__(path, providers, packs=False)
        # some of what a file computes of numbers alone, as linspace, was rounded once when it was written
        self.name, self.rtol = f"{name} in float32", torch.finfo(torch.bfloat16).eps

    def feed(self, inputs: Any, kwargs: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
        wide = lambda tensor: tensor.float() if tensor.dtype == torch.bfloat16 else tensor  # noqa: E731
        return super().feed(*pytree.tree_map_only(torch.Tensor, wide, (inputs, kwargs)))


@contextlib.contextmanager
def twin(file: Path, providers: tuple[str, ...]) -> Iterator[Twin]:
    """A file of bfloat16, run in float32; what that needs on the disk is removed.

    Raises:
        ExportError: types in the file do not fit each other. CompareError: onnxruntime cannot run it.
    """
    model = read(file)
    try:
        infer_shapes(model, check_type=True, strict_mode=True)
    except InferenceError as error:
        raise ExportError(f"types in the file do not fit each other, and no runtime will take it: {error}") from error
    # beside the target, where there is room for what is as large
    with tempfile.TemporaryDirectory(prefix=".fxprune-", dir=file.parent.parent) as folder:
        wide = onnx_ir.from_proto(model)
        onnx_ir.external_data.set_base_dir(wide.graph, os.fspath(file.parent))
        _widen(wide)
        path = Path(folder, file.name)
        onnx_ir.save(wide, path, external_data=f"{file.stem}.data")
        del wide
        yield Twin(path, providers, file.name)


def _widen(model: onnx_ir.Model) -> None:
    """Put float32 in the place of bfloat16, in place; weights are widened one by one where they are read."""
    for graph in model.graphs():
        values = [*graph.inputs, *graph.outputs, *graph.initializers.values()]
        for value in (*values, *(output for node in graph for output in node.outputs)):
            if value.const_value is not None and value.const_value.dtype == BFLOAT16:
                value.const_value = _wide(value.const_value)
            if value.dtype == BFLOAT16:
                value.dtype = FLOAT
        for node in graph:
            for key, attribute in [*node.attributes.items()]:
                node.attributes[key] = _wide_attribute(attribute)


def _wide_attribute(attribute: onnx_ir.Attr) -> onnx_ir.Attr:
    value = attribute.value
    if attribute.type == onnx_ir.AttributeType.TENSOR and value.dtype == BFLOAT16:
        return onnx_ir.AttrTensor(attribute.name, _wide(value))
    names_a_type = attribute.name in ("to", "dtype", "output_dtype", "stash_type", "softmax_precision")
    if names_a_type and attribute.type == onnx_ir.AttributeType.INT and value == BFLOAT16:
        return onnx_ir.AttrInt64(attribute.name, FLOAT)
    return attribute


def _wide(tensor: onnx_ir.TensorProtocol) -> onnx_ir.LazyTensor:
    def values() -> onnx_ir.TensorProtocol:
        bits = np.frombuffer(tensor.tobytes(), np.uint16).astype(np.uint32)
        bits <<= 16
        return onnx_ir.Tensor(bits.view(np.float32).reshape(tensor.shape.numpy()), name=tensor.name)

    shape = onnx_ir.Shape(tensor.shape.numpy())
    return onnx_ir.LazyTensor(values, FLOAT, shape, name=tensor.name, metadata_props=dict(tensor.metadata_props))


def note(comparison: Report) -> str:
    """What was compared, and how near that came."""
    largest = max((row.max_rel or 0.0 for row in comparison.rows), default=0.0)
    is_near = largest <= TOLERANCES[torch.float32]
    near = "as near as float32 rounds" if is_near else "as near as numbers are when they are rounded to bfloat16"
    return (
        f"the file computes in bfloat16, for which onnxruntime has no kernels on a CPU: it was run with float32 in the "
        f"place of bfloat16, its weights widened, and compared with the module computed like that; the largest "
        f"difference, {number(largest)}, is {near}, so that graph and weights are the module's, and what its target "
        "rounds was not compared"
    )
