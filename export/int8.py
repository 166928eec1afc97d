"""int8 by onnxruntime's quantization, weight by weight: values stay in files, and one weight at a time is read.

onnxruntime's quantizers read a model whole and add what they make of each weight to it. Here they get one whose large
weights have no values. Whenever they are to work on one of these, the model that they see is a small one of this weight
alone; what they add to that goes to a file, and stands in the large one without its values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, TensorProto
from onnx.shape_inference import infer_shapes
from onnxruntime.quantization import (
    CalibrationDataReader,
    MinMaxCalibrater,
    QDQQuantizer,
    QuantizationMode,
    QuantType,
    TensorsData,
)
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
from onnxruntime.quantization.quant_utils import add_infer_metadata
from onnxruntime.quantization.registry import IntegerOpsRegistry

from fxprune.errors import ExportError

from .quiet import quiet
from .session import session_options
from .weights import bare, elsewhere, stored
from .wire import LEAST_BYTES, read

# Operators that compute in int8, and those that only move what is int8 already. Normalizations, softmax and products
# of activations keep float32: their ranges are too wide for one step size.
STATIC = (
    "Conv", "ConvTranspose", "Gemm", "MatMul", "Gather", "Add", "Relu", "Clip", "MaxPool", "AveragePool",
    "GlobalAveragePool", "Concat", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze",
)  # fmt: skip

# Those of which the quantizers read no value of a weight but to quantize it.
_READERS = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Gather"}

# 7 bits (reduce_range): products of 8 saturate where the CPU has AVX2 alone
_WEIGHTS = {"weight_qType": QuantType.QInt8, "reduce_range": True}


def int8(path: Path, feeds: list[dict[str, np.ndarray]] | None) -> ModelProto:
    """The model with weights in int8, activations too: by the ranges of `feeds`, or without these as they come.

    Its large weights lie in files beside the model.

    Raises:
        ExportError: onnxruntime cannot quantize it.
    """
    try:
        with quiet(), path.with_suffix(".int8").open("wb") as file:
            if feeds is None:
                return _Dynamic.of(path, file).quantized()
            return _Static.of(path, file, _ranges(path, feeds)).quantized()
    except Exception as error:  # onnxruntime raises whatever its steps raise
        raise ExportError(
            f"onnxruntime cannot quantize the model to int8: {type(error).__name__}: {error}. Pass other calibration "
            "batches, or export float16."
        ) from error


class _Values:
    """The weights of a model that is read for a quantizer, and what becomes of them.

    Args:
        path: the model. file: for what is made, in the same folder.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.model, self._folder, self._file = read(path), path.parent, file
        self._transposed: dict[str, TensorProto] = {}  # what they are made of
        others = {*_otherwise_read(self.model.graph)}
        for weight in self.model.graph.initializer:
            # biases are not so large, and steps of weights are computed from them, too
            if weight.external_data and (len(weight.dims) < 2 or weight.name in others):
                weight.CopyFrom(self.whole(weight))

    def whole(self, weight: TensorProto) -> TensorProto:
        """A weight with its values."""
        if (source := self._transposed.get(weight.name)) is not None:
            return onnx.numpy_helper.from_array(stored(source, self._folder).reshape(source.dims).T, weight.name)
        if not weight.external_data:
            return weight
        found = bare(weight)
        found.raw_data = stored(weight, self._folder).tobytes()
        return found

    def put_aside(self, weight: TensorProto) -> TensorProto:
        """A weight with its values, or with those in a file where they are many."""
        if len(weight.raw_data) < LEAST_BYTES:
            return weight
        head = elsewhere(bare(weight), Path(self._file.name).name, self._file.tell(), len(weight.raw_data))
        self._file.write(weight.raw_data)
        self._file.flush()
        return head

    def replace_gemm_with_matmul(self) -> None:
        """Write products with transposed weights as products with weights that are transposed."""
        initializers = self.model.graph.initializer
        heads = {weight.name: TensorProto.FromString(weight.SerializeToString()) for weight in initializers}
        for weight in initializers:
            if weight.external_data:  # one entry, which is transposed at once
                weight.CopyFrom(bare(weight))
                weight.dims[:] = [1] * len(weight.dims)
                weight.raw_data = bytes(onnx.helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize)
        sources = ONNXModel(self.model).replace_gemm_with_matmul()
        for weight in initializers:
            source = heads[sources.get(weight.name, weight.name)]
            if not source.external_data:
                continue
            name = weight.name
            weight.CopyFrom(source)
            if name in sources:
                self._transposed[name] = source
                weight.CopyFrom(bare(source))
                weight.name, weight.dims[:] = name, [*source.dims][::-1]

    def settle(self) -> None:
        """Write what was transposed, and is not quantized."""
        for weight in self.model.graph.initializer:
            if weight.name in self._transposed:
                weight.CopyFrom(self.put_aside(self.whole(weight)))


class _WeightByWeight:
    """What a quantizer does weight by weight."""

    model: ONNXModel
    _values: _Values
    tensors_to_quantize: dict[str, Any]

    @contextlib.contextmanager
    def _alone(self, weight: TensorProto) -> Iterator[TensorProto]:
        """Within, the model is one of a single weight with its values; what is added to it, is put aside."""
        model, own = self.model, self._values.whole(weight)
        self.model = ONNXModel(ModelProto())
        self.model.add_initializer(own)
        try:
            yield own
            made = self.model
        finally:
            self.model = model
        for each in made.initializer():
            if each.name != own.name:
                model.add_initializer(self._values.put_aside(each))
        model.add_nodes(made.nodes())

    def quantized(self) -> ModelProto:
        """The model, quantized."""
        self.quantize_model()  # type: ignore[attr-defined]
        self.model.topological_sort()
        self._values.model = found = self.model.model
        self._values.settle()
        return found  # type: ignore[no-any-return]


class _Dynamic(_WeightByWeight, ONNXQuantizer):  # type: ignore[misc]
    """What `onnxruntime.quantization.quantize_dynamic` makes of a model."""

    @classmethod
    def of(cls, path: Path, file: BinaryIO) -> _Dynamic:
        """For a model; what it makes goes to a file."""
        values = _Values(path, file)
        values.replace_gemm_with_matmul()
        quantizer = cls(
            _inferred(values.model), per_channel=False, mode=QuantizationMode.IntegerOps,
            activation_qType=QuantType.QUInt8, tensors_range=None, nodes_to_quantize=[], nodes_to_exclude=[],
            op_types_to_quantize=[*IntegerOpsRegistry], extra_options={"MatMulConstBOnly": True},
            static=True,  # what it would do first else is done: it would read the model anew, whole
            **_WEIGHTS,
        )  # fmt: skip
        quantizer.static, quantizer._values = False, values
        return quantizer

    def quantize_initializer_impl(self, weight: TensorProto, *args: Any, **kwargs: Any) -> Any:
        """onnxruntime's own, of one weight."""
        with self._alone(weight) as own:
            return super().quantize_initializer_impl(own, *args, **kwargs)


class _Static(_WeightByWeight, QDQQuantizer):  # type: ignore[misc]
    """What `onnxruntime.quantization.quantize_static` makes of a model."""

    @classmethod
    def of(cls, path: Path, file: BinaryIO, ranges: TensorsData) -> _Static:
        """For a model and the ranges of its activations; what it makes goes to a file."""
        values = _Values(path, file)
        # unsigned activations and signed weights, a step for each channel: onnxruntime's advice for CPUs
        quantizer = cls(
            _inferred(values.model), per_channel=True, activation_qType=QuantType.QUInt8, tensors_range=ranges,
            nodes_to_quantize=[], nodes_to_exclude=_wide_sums(values.model), op_types_to_quantize=[*STATIC],
            extra_options={}, **_WEIGHTS,
        )  # fmt: skip
        quantizer._values = values
        return quantizer

    def _calc_initializer_quant_params(self) -> dict[str, Any]:
        found, tensors = dict[str, Any](), self.tensors_to_quantize
        weights = {weight.name: weight for weight in self.model.initializer()}
        for name in [name for name in tensors if name in weights]:
            with self._alone(weights[name]):
                self.tensors_to_quantize = {name: tensors[name]}
                found |= super()._calc_initializer_quant_params()
        self.tensors_to_quantize = tensors
        return found

    def _add_qdq_nodes_for_initializer(self, weight_proto: TensorProto) -> None:
        if (name := weight_proto.name) in self.quantized_value_map:
            return
        with self._alone(weight_proto) as own:
            super()._add_qdq_nodes_for_initializer(own)
            (made,) = self.model.nodes()
        self.model.replace_input_of_all_nodes(name, made.output[0])


def _otherwise_read(graph: onnx.GraphProto, *, is_inner: bool = False) -> Iterator[str]:
    """What operators read of which more than the quantized weight may be asked for; all that inner graphs read."""
    for node in graph.node:
        if node.op_type not in _READERS or is_inner:
            yield from node.input
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _otherwise_read(inner, is_inner=True)


def _inferred(model: ModelProto) -> ModelProto:
    """A model with the shapes of all that it computes, as the quantizers need it."""
    found: ModelProto = infer_shapes(model)
    add_infer_metadata(found)
    return found


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: list[dict[str, np.ndarray]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


class _Ranges(MinMaxCalibrater):  # type: ignore[misc]
    """onnxruntime's own, whose session leaves weights in their file."""

    def create_inference_session(self) -> None:
        """Load the model with what it is to tell of ranges."""
        options = session_options()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
        self.infer_session = onnxruntime.InferenceSession(self.augmented_model_path, options, self.execution_providers)


def _ranges(path: Path, feeds: list[dict[str, np.ndarray]]) -> TensorsData:
    """The least and the largest value of each tensor over all batches."""
    model = _inferred(read(path))
    ends = ModelProto()  # what the calibrater reads of a file before it gets its model
    ends.CopyFrom(model)
    for field in ("node", "initializer", "value_info"):
        ends.graph.ClearField(field)
    small, augmented = path.with_suffix(".ends"), path.with_suffix(".ranges")
    try:
        onnx.save(ends, small)
        calibrater = _Ranges(small, [*STATIC], str(augmented))
        calibrater.model = model
        calibrater.augment_graph()
        calibrater.create_inference_session()
        calibrater.collect_data(_Reader(feeds))
        return calibrater.compute_data()
    finally:
        small.unlink(missing_ok=True)
        augmented.unlink(missing_ok=True)


def _wide_sums(model: ModelProto) -> list[str]:
    """The sums that stay float32: all but a convolution's shortcuts, since masks and residual streams are wide."""
    convolved = {node.output[0] for node in model.graph.node if node.op_type == "Conv"}
    return [n.name for n in model.graph.node if n.op_type == "Add" and not convolved.intersection(n.input)]
