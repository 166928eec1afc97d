"""Smaller ONNX files: float16, int8 by onnxruntime's quantization, and weights stored as sparse initializers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.shape_inference import infer_shapes
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.transformers.float16 import convert_float_to_float16

from fxprune.errors import ExportError

from .quiet import quiet
from .weights import stored

# Operators that compute in int8, and those that only move what is int8 already. Normalizations, softmax and products
# of activations keep float32: their ranges are too wide for one step size.
_STATIC = (
    "Conv", "ConvTranspose", "Gemm", "MatMul", "Gather", "Add", "Relu", "Clip", "MaxPool", "AveragePool",
    "GlobalAveragePool", "Concat", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze",
)  # fmt: skip


def float16(model: ModelProto, keep_io: bool) -> ModelProto:
    """A model of `wire.read` in float16, inputs and outputs float32 where `keep_io` is true.

    Weights that lie in a file stay there; their type says what is to become of them.
    """
    with quiet():
        model = infer_shapes(model)
        stored = {weight.name: weight for weight in model.graph.initializer if weight.external_data}
        heads = {name: TensorProto.FromString(weight.SerializeToString()) for name, weight in stored.items()}
        for weight in stored.values():  # the converter reads values, if only for their shape
            weight.ClearField("external_data")
            weight.ClearField("data_location")
            weight.dims[:] = [1] * len(weight.dims)
            weight.raw_data = bytes(helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize)
        model = convert_float_to_float16(model, keep_io_types=keep_io, disable_shape_infer=True)
    for weight in model.graph.initializer:
        if (head := heads.get(weight.name)) is not None:
            head.data_type = weight.data_type
            weight.CopyFrom(head)
    casts = [value for value in model.graph.value_info if value.name.rpartition("_cast_to_")[0] in heads]
    for value in casts:  # of the shape that was read
        model.graph.value_info.remove(value)
    converted = onnx_ir.from_proto(model)
    converted.graph.sort()  # the converter puts its casts of the inputs last
    proto: ModelProto = onnx_ir.to_proto(converted)
    return proto


def int8(path: Path, feeds: list[dict[str, np.ndarray]] | None) -> ModelProto:
    """The model with weights in int8, activations too: by the ranges of `feeds`, or without these as they come.

    Raises:
        ExportError: onnxruntime cannot quantize it.
    """
    target, large = path.with_suffix(".int8"), len(list(path.parent.iterdir())) > 1
    # 7 bits (reduce_range): products of 8 saturate where the CPU has AVX2 alone
    weights = {"weight_type": QuantType.QInt8, "reduce_range": True, "use_external_data_format": large}
    try:
        with quiet():
            if feeds is None:
                quantize_dynamic(path, target, **weights)
            else:
                # unsigned activations and signed weights, a step for each channel: onnxruntime's advice for CPUs
                quantize_static(
                    path, target, _Reader(feeds), op_types_to_quantize=list(_STATIC), per_channel=True,
                    nodes_to_exclude=_wide_sums(onnx.load(path, load_external_data=False)),
                    activation_type=QuantType.QUInt8, **weights,
                )  # fmt: skip
        return onnx.load(target)
    except Exception as error:  # onnxruntime raises whatever its steps raise
        raise ExportError(
            f"onnxruntime cannot quantize the model to int8: {type(error).__name__}: {error}. Pass other calibration "
            "batches, or export float16."
        ) from error


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: list[dict[str, np.ndarray]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def _wide_sums(model: ModelProto) -> list[str]:
    """The sums that stay float32: all but a convolution's shortcuts, since masks and residual streams are wide."""
    convolved = {node.output[0] for node in model.graph.node if node.op_type == "Conv"}
    return [n.name for n in model.graph.node if n.op_type == "Add" and not convolved.intersection(n.input)]


def sparse_initializers(model: ModelProto, folder: Path) -> ModelProto:
    """A model of `wire.read`, with the initializers that get smaller by it as sparse ones; those in a file stay there.

    Indices are linear, 8 bytes a value; the layouts that onnxruntime reads are listed in
    https://onnx.ai/onnx/repo-docs/IR.html (sparse tensors).
    """
    graph = model.graph
    for tensor in list(graph.initializer):
        values = stored(tensor, folder) if tensor.external_data else numpy_helper.to_array(tensor).reshape(-1)
        count = int(np.count_nonzero(values)) if values.dtype.kind in "fi" else 0
        if not count or count * (values.itemsize + 8) + 64 >= values.nbytes:
            continue
        if tensor.external_data:
            sparse = graph.sparse_initializer.add(dims=tensor.dims)
            sparse.values.CopyFrom(tensor)
            sparse.values.dims[:] = [count]
        else:
            (index,) = np.nonzero(values)
            kept, indices = (numpy_helper.from_array(each, tensor.name) for each in (values[index], index))
            indices.ClearField("name")
            graph.sparse_initializer.append(helper.make_sparse_tensor(kept, indices, list(tensor.dims)))
        graph.initializer.remove(tensor)
    return model
