"""What stands in an exported file: its tensors and their zeros, multiplications, operators, metadata."""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch.utils._pytree as pytree
from torch.export import ExportedProgram

from fxprune.capture.archives import read_program
from fxprune.capture.programs import input_nodes
from fxprune.channels.costs import macs_of_one_sample
from fxprune.errors import ArgumentTypeError, CompareError
from fxprune.files import check_suffix
from fxprune.graph.batch import Batch
from fxprune.graph.interpretation import run
from fxprune.graph.macs import NodeMacs
from fxprune.reports import Readable, columns, first_of, plain

from .metadata import SIZES


@dataclass(frozen=True, repr=False)
class Contents(Readable):
    """The contents of a file; `table()` has every tensor, `str` the sums.

    Attributes:
        tensors: (name, shape, dtype, entries, zeros) of each stored tensor. operators: how often each occurs.
        macs: multiply-adds of convolutions and matrix products for one sample; None where shapes are not known.
        metadata: what the file says of itself, the plan of what was removed included.
        sample: what is counted, "one sample of 3x224x224".
        parameters, zeros: entries of all tensors, and those of them that are zero.
    """

    tensors: list[tuple[str, tuple[int, ...], str, int, int]]
    operators: dict[str, int]
    macs: int | None
    metadata: dict[str, str]
    sample: str = ""

    @property
    def parameters(self) -> int:
        """Entries of all tensors."""
        return sum(entries for _, _, _, entries, _ in self.tensors)

    @property
    def zeros(self) -> int:
        """Those of them that are zero."""
        return sum(zeros for *_, zeros in self.tensors)

    def __str__(self) -> str:
        macs = "unknown" if self.macs is None else f"{self.macs:,}"
        counts = first_of(f"{count} {name}" for name, count in self.operators.items())
        sizes = f"{self.parameters:,} parameters, {self.zeros:,} of them zero"
        return f"{sizes}; {macs} multiply-adds for {self.sample}\noperators: {counts}"

    def table(self) -> str:
        """Every tensor with its zeros, then the sums, all operators, and what the file says of itself."""
        rows = [("tensor", "shape", "type", "entries", "zeros")]
        for name, shape, kind, entries, zeros in self.tensors:
            rows.append((name, "x".join(map(str, shape)), kind, f"{entries:,}", f"{zeros / max(entries, 1):.1%}"))
        operators = ", ".join(f"{count} {name}" for name, count in self.operators.items())
        told = [f"{key}: {value}" for key, value in self.metadata.items()]
        return "\n".join([columns(rows), str(self).splitlines()[0], f"operators: {operators}", *told])

    def to_dict(self) -> dict[str, Any]:
        """The contents in JSON's types; a tensor is [name, shape, dtype, entries, zeros]."""
        found: dict[str, Any] = plain(vars(self))
        return found | {"parameters": self.parameters, "zeros": self.zeros}


def inspect(path: str | os.PathLike[str]) -> Contents:
    """Read an .onnx or .pt2 file.

    Raises:
        SuffixError: it ends otherwise. CompareError: it is damaged. ArgumentTypeError: no path.

    Example:
        >>> inspect("model.onnx").operators["Conv"]
        20
    """
    if not isinstance(path, str | os.PathLike):
        raise ArgumentTypeError(f"inspect takes the path of an .onnx or .pt2 file, got {type(path).__name__}.")
    readers = {".onnx": _onnx, ".pt2": _program}
    check_suffix(path, *readers, what="inspected")
    try:
        return readers[Path(path).suffix](os.fspath(path))
    except Exception as error:  # the readers of both formats raise whatever they raise
        raise CompareError(f"'{path}' cannot be read: {type(error).__name__}: {error}") from error


def _onnx(path: str) -> Contents:
    model = onnx.load(path)
    tensors = _stored_tensors(model.graph)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    batch = _Batch.of(model.graph, {name for name, *_ in tensors}, json.loads(metadata.get(SIZES, "{}")))
    shapes = {name: shape for name, shape, *_ in tensors} | _inferred_shapes(model, batch)
    operators = Counter(node.op_type for node in model.graph.node)
    macs = _macs(model.graph, shapes, batch)
    return Contents(tensors, dict(operators.most_common()), macs, metadata, batch.text)


@dataclass(frozen=True)
class _Batch:
    """What of the sizes in a file is the batch: the free size of axis 0 of its inputs, or a fixed one that all share.

    Attributes:
        inputs: the inputs that are no weights.
        sizes: of free axes by name, for one sample: 1 for the batch and for what the file does not tell.
        fixed: a batch that is written in the file; 1 where it is free, or the inputs share none.
        text: what is counted.
    """

    inputs: list[onnx.ValueInfoProto]
    sizes: dict[str, int]
    fixed: int
    text: str

    @classmethod
    def of(cls, graph: onnx.GraphProto, stored: set[str], captured: dict[str, int]) -> _Batch:
        inputs = [value for value in graph.input if value.name not in stored]
        firsts = [value.type.tensor_type.shape.dim[0] for value in inputs if value.type.tensor_type.shape.dim]
        free = [size.dim_param for size in firsts if size.dim_param]
        batch = {name for name in free if captured.get(name) == captured.get(free[0])}
        names = {size.dim_param for value in inputs for size in value.type.tensor_type.shape.dim if size.dim_param}
        sizes = {name: 1 if name in batch else captured.get(name, 1) for name in names}
        shared = not free and len(firsts) == len(inputs) and len({size.dim_value for size in firsts}) == 1
        has_batch = bool(free) or shared
        fixed = firsts[0].dim_value or 1 if shared else 1
        return cls(inputs, sizes, fixed, _text(inputs, sizes, 1 if has_batch else 0))


def _text(inputs: list[onnx.ValueInfoProto], sizes: dict[str, int], start: int) -> str:
    """What is counted, as `fxprune.graph.batch.Batch` says it; `start` is the first axis that is not the batch."""
    shapes = [[size.dim_value or sizes.get(size.dim_param, 1) for size in v.type.tensor_type.shape.dim] for v in inputs]
    texts = ["x".join(map(str, shape[start:])) or "one number" for shape in shapes]
    if len(texts) > 1:
        texts = [f"{value.name} {text}" for value, text in zip(inputs, texts, strict=True)]
    free = [
        f"axis {axis} of {value.name} at {sizes[size.dim_param]}"
        for value in inputs
        for axis, size in enumerate(value.type.tensor_type.shape.dim)
        if axis >= start and size.dim_param
    ]
    what = "one sample" if start else "inputs"
    return f"{what} of {', '.join(texts) or 'no tensor'}" + (f", {', '.join(free)}" if free else "")


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


def _inferred_shapes(model: onnx.ModelProto, batch: _Batch) -> dict[str, tuple[int, ...]]:
    """The shapes of all values, as far as they follow from those of inputs; sets the model's free sizes."""
    for value in batch.inputs:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_value = batch.sizes[size.dim_param]  # sets the name aside
    del model.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes: dict[str, tuple[int, ...]] = {}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        sizes = value.type.tensor_type.shape.dim
        if all(size.HasField("dim_value") for size in sizes):
            shapes[value.name] = tuple(size.dim_value for size in sizes)
    return shapes


def _macs(graph: onnx.GraphProto, shapes: dict[str, tuple[int, ...]], batch: _Batch) -> int | None:
    moving = {value.name for value in batch.inputs}
    total = 0.0
    try:
        for node in graph.node:
            depends = not moving.isdisjoint(node.input)
            moving.update(node.output if depends else ())
            total += _macs_of(node, shapes) / (batch.fixed if depends else 1)
    except KeyError:  # a shape that is not known
        return None
    return round(total)


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
    sample = Batch.of(program.graph, input_nodes(program))
    macs = None if program.example_inputs is None else _counted(program, sample)
    return Contents(tensors, dict(operators.most_common()), macs, json.loads(notes[0] if notes else "{}"), str(sample))


def _counted(program: ExportedProgram, sample: Batch) -> int:
    """The multiply-adds of one of a program's example inputs, by torch's counter."""
    held = {**program.constants, **program.state_dict}
    given = iter(pytree.tree_leaves(program.example_inputs))
    inputs = [held[s.target] if s.target else next(given) for s in program.graph_signature.input_specs]
    with NodeMacs() as counted:
        run(program.graph, lambda name: getattr(program.graph_module, name), inputs, watch=counted.watch)
    return macs_of_one_sample(program.graph, counted.macs, sample)
