"""Tensors as the content of a safetensors file, part by part: nothing of their size is held beside them."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import Tensor

_LENGTH = struct.Struct("<Q")  # of the header, in front of it


@dataclass(frozen=True)
class StreamedTensors:
    """What `safetensors.torch.save` gives of the same tensors, but for their order.

    Attributes:
        head: the content up to the first value. tensors: contiguous, on the CPU, in order.
    """

    head: bytes
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> StreamedTensors:
        """Of tensors by name, which are read where they are.

        Raises:
            KeyError: safetensors has no name for a dtype.
        """
        # values start at multiples of their size
        ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
        dtypes = {dtype: _dtype_name(dtype) for dtype in {tensor.dtype for tensor in ordered.values()}}
        entries, start = {}, 0
        for name, tensor in ordered.items():
            end = start + tensor.nbytes
            entries[name] = {
                "dtype": dtypes[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
            start = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _LENGTH.size)
        return cls(_LENGTH.pack(len(text)) + text, tuple(ordered.values()))

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return len(self.head) + sum(tensor.nbytes for tensor in self.tensors)

    def parts(self) -> Iterator[bytes | memoryview]:
        """The content in order: the header, then the memory of each tensor."""
        yield self.head
        for tensor in self.tensors:
            if tensor.numel():
                yield tensor.reshape(-1).view(torch.uint8).numpy().data

    def sha256(self) -> str:
        """Of all parts."""
        found = hashlib.sha256()
        for part in self.parts():
            found.update(part)
            del part  # before the next one comes
        return found.hexdigest()


def _dtype_name(dtype: torch.dtype) -> str:
    content = safetensors.torch.save({"one": torch.zeros(1, dtype=dtype)})
    (length,) = _LENGTH.unpack_from(content)
    name: str = json.loads(content[_LENGTH.size : _LENGTH.size + length])["one"]["dtype"]
    return name
