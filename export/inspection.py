"""What stands in an exported file: its tensors and their zeros, multiplications, operators, metadata."""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch

from fxprune.capture.archives import read_program
from fxprune.errors import CompareError
from fxprune.graph.macs import counted_macs, flop_counter


@dataclass(frozen=True)
class Contents:
    """The contents of a file.

    Attributes:
        tensors: (name, shape, dtype, entries, zeros) of each stored tensor. operators: how often each occurs.
        macs: multiply-adds of convolutions and matrix products for one sample; of a .pt2, for its example inputs; None
            where shapes are not known. metadata: what the file says of itself, the plan of what was removed included.
    """

    tensors: list[tuple[str, tuple[int, ...], str, int, int]]
    operators: dict[str, int]
    macs: int | None
    metadata: dict[str, str]


def inspect(path: str | os.PathLike[str]) -> Contents:
    """Read an .onnx or .pt2 file.

    Raises:
        CompareError: it is neither, or damaged.

    Example:
        >>> inspect("model.onnx").operators["Conv"]
        20
    """
    readers = {".onnx": _onnx, ".pt2": _program}
    if Path(path).suffix not in readers:
        raise CompareError(f"'{path}' was to be inspected; files that can be end in {' or '.join(readers)}.")
    try:
        return readers[Path(path).suffix](os.fspath(path))
    except Exception as error:  # the readers of both formats raise whatever they raise
        raise CompareError(f"'{path}' cannot be read: {type(error).__name__}: {error}") from error


def _onnx(path: str) -> Contents:
    model = onnx.load(path)
    tensors = _stored_tensors(model.graph)
    shapes = {name: shape for name, shape, *_ in tensors} | _inferred_shapes(model)
    operators = Counter(node.op_type for node in model.graph.node)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    return Contents(tensors, dict(operators.most_common()), _macs(model.graph, shapes), metadata)


def _stored_tensors(graph: onnx.GraphProto) -> list[tuple[str, tuple[int, ...], str, int, int]]:
    tensors = []
    for tensor in graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        tensors.append((tensor.name, values.shape, str(values.dtype), values.size, int((values == 0).sum())))
    for sparse in graph.sparse_initializer:
        kept, shape = onnx.numpy_helper.to_array(sparse.values), tuple(sparse.dims)
        entries = math.prod(shape)
        zeros = entries - int((kept != 0).sum())
        tensors.append((sparse.values.name, shape, f"{kept.dtype}, sparse", entries, zeros))
    return tensors


def _inferred_shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """The shapes of all values for one sample, as far as they follow from that; changes the model's free sizes to 1."""
    for value in model.graph.input:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_value = 1  # sets the name aside
    del model.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes: dict[str, tuple[int, ...]] = {}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        sizes = value.type.tensor_type.shape.dim
        if all(size.HasField("dim_value") for size in sizes):
            shapes[value.name] = tuple(size.dim_value for size in sizes)
    return shapes


def _macs(graph: onnx.GraphProto, shapes: dict[str, tuple[int, ...]]) -> int | None:
    try:
        return sum(_macs_of(node, shapes) for node in graph.node)
    except KeyError:  # a shape that is not known
        return None


def _macs_of(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    kind = node.op_type.removeprefix("QLinear").removesuffix("Integer")
    if kind in ("Conv", "ConvTranspose"):
        positions = shapes[node.output[0] if kind == "Conv" else node.input[0]]
        return math.prod(positions) * math.prod(shapes[node.input[1]][1:])
    if kind in ("Gemm", "MatMul"):
        transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][0 if transposed else -1]
    return 0


def _program(path: str) -> Contents:
    program = read_program(path)
    with zipfile.ZipFile(path) as archive:
        notes = [archive.read(name) for name in archive.namelist() if name.endswith("/extra/fxprune.json")]
    tensors = [
        (name, tuple(t.shape), str(t.dtype).removeprefix("torch."), t.numel(), int((t == 0).sum()))
        for name, t in program.state_dict.items()
    ]
    operators = Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")
    macs = None
    if program.example_inputs is not None:
        args, kwargs = program.example_inputs
        with flop_counter() as counter, torch.no_grad():
            program.module()(*args, **kwargs)
        macs = counted_macs(counter)
    return Contents(tensors, dict(operators.most_common()), macs, json.loads(notes[0] if notes else "{}"))
