"""Smaller ONNX files: float16, and weights stored as sparse initializers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.shape_inference import infer_shapes
from onnxruntime.transformers.float16 import convert_float_to_float16

from .quiet import quiet
from .weights import stored


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
