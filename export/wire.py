"""ONNX files read and written piece by piece, as protobuf's encoding has it, so that no more than one weight is held.

https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import onnx

# numbers of fields
GRAPH_OF_MODEL, INITIALIZER_OF_GRAPH, SPARSE_INITIALIZER_OF_GRAPH, RAW_DATA_OF_TENSOR = 7, 5, 15, 9
VALUES_OF_SPARSE, INDICES_OF_SPARSE = 1, 2
LEAST_BYTES = 1024  # of weights that stay in their file

_NUMBER, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5  # how a field is written


def varint(number: int) -> bytes:
    """A length as protobuf has it: seven bits a byte, the lowest first, the highest bit set where more follow."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def begun(field: int, size: int) -> bytes:
    """What stands before the bytes of a field."""
    return bytes([field << 3 | _BYTES]) + varint(size)


class _Field(NamedTuple):
    """A field of a message: its number, and where it starts, where its content does, and where it ends."""

    number: int
    start: int
    content: int
    end: int


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[_Field]:
    """The fields of the message between two places."""
    while start < end:
        key, content = _number(data, start)
        kind = key & 7
        if kind == _BYTES:
            size, content = _number(data, content)
            last = content + size
        elif kind == _NUMBER:
            _, last = _number(data, content)
        else:
            last = content + {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}[kind]
        yield _Field(key >> 3, start, content, last)
        start = last


def _number(data: mmap.mmap, place: int) -> tuple[int, int]:
    """The number that is written at a place, and where it ends."""
    found, shift = 0, 0
    while True:
        byte = data[place]
        found |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return found, place


def read(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """A model whose large weights stay in their file: as external data, found in the ONNX file itself where they are.

    Args:
        path: the file, well-formed. What lies beside it, stays there.
    """
    rest, graph, weights = bytearray(), bytearray(), list[onnx.TensorProto]()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for part in _fields(data, 0, len(data)):
            if part.number != GRAPH_OF_MODEL:
                rest += data[part.start : part.end]
                continue
            for inner in _fields(data, part.content, part.end):
                if inner.number == INITIALIZER_OF_GRAPH:
                    weights.append(_weight(data, inner, Path(path).name))
                else:
                    graph += data[inner.start : inner.end]
    model = onnx.ModelProto()
    model.ParseFromString(bytes(rest))
    model.graph.ParseFromString(bytes(graph))
    model.graph.initializer.extend(weights)
    return model


def _weight(data: mmap.mmap, field: _Field, location: str) -> onnx.TensorProto:
    head, raw = bytearray(), None
    for part in _fields(data, field.content, field.end):
        if part.number == RAW_DATA_OF_TENSOR and part.end - part.content >= LEAST_BYTES:
            raw = part
        else:
            head += data[part.start : part.end]
    weight = onnx.TensorProto()
    weight.ParseFromString(bytes(head))
    if raw is not None:
        weight.data_location = onnx.TensorProto.EXTERNAL
        entries = {"location": location, "offset": raw.content, "length": raw.end - raw.content}
        for key, value in entries.items():
            weight.external_data.add(key=key, value=str(value))
    return weight
