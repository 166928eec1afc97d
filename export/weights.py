"""Weights of ONNX files, written one after the other: each is read, or made, when its turn comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnxruntime.transformers.float16 import convert_np_to_float16

from .wire import (
    GRAPH_OF_MODEL,
    INDICES_OF_SPARSE,
    INITIALIZER_OF_GRAPH,
    LEAST_BYTES,
    RAW_DATA_OF_TENSOR,
    SPARSE_INITIALIZER_OF_GRAPH,
    VALUES_OF_SPARSE,
    begun,
)

_AT_ONCE = 2**18  # entries that are converted

Place = tuple[str, int]  # in which file, from which byte on


def _entries(weight: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in weight.external_data}


def place(weight: TensorProto) -> Place:
    """Where the values of a weight are that lie in a file."""
    entries = _entries(weight)
    return entries["location"], int(entries.get("offset", 0))


def stored(weight: TensorProto, folder: Path, data_type: int | None = None) -> np.ndarray:
    """The values of a weight that lie in a file, flat and mapped.

    Args:
        weight: as `wire.read` gives it. folder: of the model. data_type: of these values, None: of the weight.
    """
    location, offset = place(weight)
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(data_type or weight.data_type))
    length = int(_entries(weight)["length"])
    return np.memmap(folder / location, dtype, "r", offset, (length // dtype.itemsize,))


def bare(weight: TensorProto) -> TensorProto:
    """A weight without its values."""
    found = TensorProto()
    found.CopyFrom(weight)
    for own in ("external_data", "data_location", "raw_data"):
        found.ClearField(own)
    return found


def elsewhere(head: TensorProto, location: str, start: int, size: int) -> TensorProto:
    """A weight without values, which lie in a file of the same folder, so many bytes from a place on."""
    found = TensorProto()
    found.CopyFrom(head)
    found.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": start, "length": size}.items():
        found.external_data.add(key=key, value=str(value))
    return found


def _in_tensor(head: TensorProto, size: int) -> bytes:
    """What stands in a tensor before its values."""
    found: bytes = head.SerializeToString()
    return found + begun(RAW_DATA_OF_TENSOR, size) if size else found


@dataclass(frozen=True)
class Dense:
    """An initializer.

    Attributes:
        head: without values, or with such as are not raw. size: bytes of raw values. values: writes these to a file.
    """

    head: TensorProto
    size: int
    values: Callable[[BinaryIO], object]

    @classmethod
    def of(cls, weight: TensorProto, types: Mapping[Place, int], folder: Path) -> Dense:
        """Of a weight within a model, or in a file, where it may have another type: by place that there."""
        if not weight.external_data:
            raw = weight.raw_data
            return cls(bare(weight), len(raw), lambda file: file.write(raw))
        before = types.get(place(weight), weight.data_type)
        if before == weight.data_type:
            length = int(_entries(weight)["length"])
            return cls(bare(weight), length, lambda file: file.write(stored(weight, folder).data))
        assert (before, weight.data_type) == (TensorProto.FLOAT, TensorProto.FLOAT16)
        size = int(_entries(weight)["length"]) // 2

        def narrow(file: BinaryIO) -> None:
            values = stored(weight, folder, before)
            for start in range(0, len(values), _AT_ONCE):
                piece: np.ndarray = convert_np_to_float16(values[start : start + _AT_ONCE])
                file.write(piece.data)

        return cls(bare(weight), size, narrow)

    @property
    def start(self) -> bytes:
        """What stands in a graph before its values."""
        before = _in_tensor(self.head, self.size)
        return begun(INITIALIZER_OF_GRAPH, len(before) + self.size) + before

    @property
    def bytes_in_graph(self) -> int:
        """All that it takes there."""
        return len(self.start) + self.size

    def write(self, file: BinaryIO) -> None:
        """Write it as a field of a graph."""
        file.write(self.start)
        if self.size:
            self.values(file)

    def single(self, graph: onnx.GraphProto) -> None:
        """Add it to a graph with one entry, zero."""
        tensor = graph.initializer.add()
        tensor.CopyFrom(self.head)
        if self.size:
            tensor.dims[:] = [1] * len(self.head.dims)
            tensor.raw_data = bytes(16)  # that of the widest type


@dataclass(frozen=True)
class Sparse:
    """A sparse initializer of what lies in a file, dense.

    Attributes:
        dims: of the whole. head: of the values that are not zero, a row. dense: the values there.
    """

    dims: tuple[int, ...]
    head: TensorProto
    dense: Callable[[], np.ndarray]

    @classmethod
    def of(cls, weight: onnx.SparseTensorProto, folder: Path) -> Sparse:
        """Of one whose values are those of a dense weight in a file."""
        values = weight.values
        return cls(tuple(weight.dims), bare(values), lambda: stored(values, folder))

    def _parts(self) -> Iterator[tuple[bytes, int, Callable[[], np.ndarray]]]:
        """What is written: what stands before some values, their bytes, and these."""
        (count,) = self.head.dims
        width = np.dtype(helper.tensor_dtype_to_np_dtype(self.head.data_type)).itemsize
        indices = TensorProto(data_type=TensorProto.INT64, dims=[count])
        fields = (VALUES_OF_SPARSE, self.head, width), (INDICES_OF_SPARSE, indices, 8)
        for (field, head, size), values in zip(fields, (self._values, self._indices), strict=True):
            before = _in_tensor(head, count * size)
            yield begun(field, len(before) + count * size) + before, count * size, values

    def _values(self) -> np.ndarray:
        dense = self.dense()
        return np.ascontiguousarray(dense[dense != 0])

    def _indices(self) -> np.ndarray:
        return np.flatnonzero(self.dense()).astype(np.int64)

    @property
    def _end(self) -> bytes:
        return onnx.SparseTensorProto(dims=self.dims).SerializeToString()  # type: ignore[no-any-return]

    @property
    def _size(self) -> int:
        return sum(len(before) + size for before, size, _ in self._parts()) + len(self._end)

    @property
    def bytes_in_graph(self) -> int:
        """All that it takes there."""
        return len(begun(SPARSE_INITIALIZER_OF_GRAPH, self._size)) + self._size

    def write(self, file: BinaryIO) -> None:
        """Write it as a field of a graph."""
        file.write(begun(SPARSE_INITIALIZER_OF_GRAPH, self._size))
        for before, _, values in self._parts():
            file.write(before)
            file.write(values().data)
        file.write(self._end)

    def single(self, graph: onnx.GraphProto) -> None:
        """Add it to a graph with one entry, zero."""
        tensor = graph.initializer.add(name=self.head.name, data_type=self.head.data_type, dims=[1] * len(self.dims))
        tensor.raw_data = bytes(16)


Weight = Dense | Sparse


def _check(model: onnx.ModelProto, weights: Sequence[Weight]) -> None:
    small = onnx.ModelProto()
    small.CopyFrom(model)
    for weight in weights:
        weight.single(small.graph)
    onnx.checker.check_model(small)


def write(model: onnx.ModelProto, weights: Sequence[Weight], path: Path) -> None:
    """Write a model whose weights are within, one after the other.

    As one message they would be held three times, as tensors, as a message and as its bytes, and twice again where the
    file is checked. So the file is put together from the bytes of smaller messages, and checked with one entry of each
    weight.

    Args:
        model: without these weights; used up. weights: all others. path: the file.

    Raises:
        onnx.checker.ValidationError: it is no valid model.
    """
    _check(model, weights)
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    size = len(graph) + sum(weight.bytes_in_graph for weight in weights)
    with path.open("wb") as file:
        file.write(model.SerializeToString() + begun(GRAPH_OF_MODEL, size) + graph)
        for weight in weights:
            weight.write(file)


def write_beside(model: onnx.ModelProto, weights: Sequence[Weight], path: Path) -> None:
    """Write a model whose dense weights lie beside it, in a file of its name and `.data`; else as `write`."""
    within: list[Weight] = []
    location, start = f"{path.name}.data", 0
    with path.with_name(location).open("wb") as file:
        for weight in weights:
            if isinstance(weight, Sparse) or weight.size < LEAST_BYTES:  # shapes among them, which must be within
                within.append(weight)
                continue
            head = elsewhere(weight.head, location, start, weight.size)
            within.append(_Elsewhere(head, 0, weight.values))
            weight.values(file)
            start += weight.size
    write(model, within, path)


class _Elsewhere(Dense):
    """An initializer whose values lie in another file."""

    def single(self, graph: onnx.GraphProto) -> None:
        Dense(bare(self.head), 1, self.values).single(graph)
