"""Smaller ONNX files: float16, int8 by onnxruntime's quantization, and weights stored as sparse initializers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
from onnx import ModelProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.transformers.float16 import convert_float_to_float16

from fxprune.errors import ExportError

from .quiet import quiet

# Operators that compute in int8, and those that only move what is int8 already. Normalizations, softmax and products
# of activations keep float32: their ranges are too wide for one step size.
_STATIC = (
    "Conv", "ConvTranspose", "Gemm", "MatMul", "Gather", "Add", "Relu", "Clip", "MaxPool", "AveragePool",
    "GlobalAveragePool", "Concat", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze",
)  # fmt: skip


def float16(model: ModelProto, keep_io: bool) -> ModelProto:
    """The model in float16, inputs and outputs float32 where `keep_io` is true."""
    with quiet():
        converted = onnx_ir.from_proto(convert_float_to_float16(model, keep_io_types=keep_io))
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


def sparse_initializers(model: ModelProto) -> ModelProto:
    """The model, with the initializers that get smaller by it stored as sparse ones in place.

    Indices are linear, 8 bytes a value; the layouts that onnxruntime reads are listed in
    https://onnx.ai/onnx/repo-docs/IR.html (sparse tensors).
    """
    graph = model.graph
    for tensor in list(graph.initializer):
        values = numpy_helper.to_array(tensor)
        flat = values.reshape(-1)
        (index,) = np.nonzero(flat)
        if not index.size or values.dtype.kind not in "fi" or index.size * (values.itemsize + 8) + 64 >= values.nbytes:
            continue
        kept = numpy_helper.from_array(flat[index], tensor.name)
        graph.sparse_initializer.append(
            helper.make_sparse_tensor(kept, numpy_helper.from_array(index.astype(np.int64)), list(tensor.dims))
        )
        graph.initializer.remove(tensor)
    return model
