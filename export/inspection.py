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
    graph, tensors = model.graph, []
    for tensor in graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        tensors.append((tensor.name, values.shape, str(values.dtype), values.size, int((values == 0).sum())))
    for sparse in graph.sparse_initializer:
        kept, shape = onnx.numpy_helper.to_array(sparse.values), tuple(sparse.dims)
        count = math.prod(shape)
        tensors.append((sparse.values.name, shape, f"{kept.dtype}, sparse", count, count - int((kept != 0).sum())))
    for value in graph.input:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_value = 1  # sets the name aside
    del graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {name: shape for name, shape, *_ in tensors}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        sizes = value.type.tensor_type.shape.dim
        if all(size.HasField("dim_value") for size in sizes):
            shapes[value.name] = tuple(size.dim_value for size in sizes)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    return Contents(tensors, dict(Counter(n.op_type for n in graph.node).most_common()), _macs(graph, shapes), metadata)


def _macs(graph: onnx.GraphProto, shapes: dict[str, tuple[int, ...]]) -> int | None:
    total = 0
    try:
        for node in graph.node:
            kind = node.op_type.removeprefix("QLinear").removesuffix("Integer")
            if kind in ("Conv", "ConvTranspose"):
                per = shapes[node.output[0] if kind == "Conv" else node.input[0]]
                total += math.prod(per) * math.prod(shapes[node.input[1]][1:])
            elif kind in ("Gemm", "MatMul"):
                flipped = any(a.name == "transA" and a.i for a in node.attribute)
                total += math.prod(shapes[node.output[0]]) * shapes[node.input[0]][0 if flipped else -1]
    except KeyError:
        return None
    return total


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
