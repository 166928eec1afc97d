"""Archives that others may have written: members and `torch.export` programs, read without running code."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import zipfile
from collections.abc import Iterable
from typing import IO, Any, cast

import numpy as np
import sympy
import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.export import ExportedProgram
from torch.export.pt2_archive import PT2ArchiveReader
from torch.export.pt2_archive.constants import ARCHIVE_VERSION_PATH, ARCHIVE_VERSION_VALUE

from fxprune.errors import ArtifactError
from fxprune.torch_internals import OpOverload, programs_in, size_function

Source = str | os.PathLike[str] | IO[bytes]

_SAFE_MEMBER = re.compile(
    r"archive_format|archive_version|byteorder|\.\w+(/\w+)?|models/model\.json|data/sample_inputs/model\.pt|"
    r"data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
)
_ENUM = re.compile(r"__enum__|\\u00[2-7]")  # torch imports the module of an enumeration; JSON writers escape no ASCII
_CALL = re.compile(r"(\w+)\s*\(")
_ARITHMETIC = re.compile(r"([\w\s,=()+*/<>-]|\d\.\d|'\w+')*")
_ARGUMENTS = (
    fx.Node, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format,
    torch.SymInt, torch.SymFloat, torch.SymBool, OpOverload,
)  # fmt: skip


def read_members(source: Source) -> dict[str, bytes]:
    """The members of an uncompressed archive by name; raises ArtifactError where it is cut or ambiguous."""
    with zipfile.ZipFile(source) as archive:
        return {item.filename: archive.read(item) for item in _items(archive)}


def _items(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    items = archive.infolist()
    if items and items[0].header_offset:  # cut inside a program, whose own archive is then found
        raise ArtifactError("the file is truncated: what is left ends in another archive. Write it again.")
    if len(set(archive.namelist())) < len(items) or any(item.compress_type for item in items):
        raise ArtifactError("the archive has members twice, or compressed; fxprune and torch write neither.")
    return items


def is_program(members: Iterable[str]) -> bool:
    """Whether an archive with these members is one of `torch.export.save`."""
    return any(name.endswith("/archive_format") for name in members)


def read_program(source: Source, *, maps: bool = False) -> ExportedProgram:
    """The program in an archive of `torch.export.save`.

    `torch.export.load` unpickles some members, loads libraries, imports modules and evaluates expressions for sizes.
    What runs code that way is refused here, and torch is given the rest.

    Args:
        source: the archive.
        maps: whether large tensors stay in it, which is then a file that is not to change while the program is used;
            what is written into them stays out of the file.

    Raises:
        ArtifactError: a member could run code, or is unknown. What torch raises for a damaged archive comes as it is.
    """
    with zipfile.ZipFile(source) as archive:
        members = _Members(archive, maps=maps)
        if (version := members.read_string(ARCHIVE_VERSION_PATH)) != ARCHIVE_VERSION_VALUE:
            raise ArtifactError(f"the program is of version {version}; torch reads {ARCHIVE_VERSION_VALUE}.")
        program: ExportedProgram = programs_in(cast(PT2ArchiveReader, members), members.get_file_names(), None)["model"]
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            _refuse_odd_nodes(module.graph)
    return program


class _Members:
    """The members of an archive that torch reads as data alone, as torch's own reader gives them.

    Args:
        archive: open. maps: whether large tensors are mapped from its file.

    Raises:
        ArtifactError: there are others.
    """

    def __init__(self, archive: zipfile.ZipFile, *, maps: bool) -> None:
        self._read: dict[str, bytes | np.memmap[Any, Any]] = {}
        for item in _items(archive):
            name, (_, _, inner) = item.filename, item.filename.partition("/")
            if inner.startswith("extra/"):  # anything, which nothing reads
                continue
            if not _SAFE_MEMBER.fullmatch(inner):
                raise ArtifactError(f"member {name!r} may hold pickles or libraries, which run code: not loaded.")
            if maps and inner.startswith("data/") and not inner.endswith((".json", ".pt")):
                self._read[inner] = _mapped(archive, item)
                continue
            self._read[inner] = content = archive.read(item)
            if inner.endswith("model.pt") and content:
                torch.load(io.BytesIO(content), weights_only=True)  # where this fails, torch would unpickle anything
            elif inner.endswith(".json"):
                refuse_code(json.loads(content))

    @property
    def archive_file(self) -> _Members:
        """What torch's own reader reads."""
        return self

    def get_file_names(self) -> list[str]:
        """Of all members."""
        return [*self._read]

    def read_bytes(self, name: str) -> bytes:
        """A member."""
        return bytes(self._read[name])

    def read_string(self, name: str) -> str:
        """A member that is text."""
        return self.read_bytes(name).decode()

    def get_record_size(self, name: str) -> int:
        """Of a member, in bytes."""
        return len(self._read[name])

    def get_storage_from_record(self, name: str, count: int, dtype: torch.dtype) -> torch.Tensor:
        """A tensor with the memory of a member."""
        content = self._read[name]
        if isinstance(content, bytes):
            return torch.frombuffer(bytearray(content), dtype=dtype)
        return torch.from_numpy(content).view(dtype)


_AT_ONCE = 2**20  # bytes of a member that are read to check it


def _mapped(archive: zipfile.ZipFile, item: zipfile.ZipInfo) -> bytes | np.memmap[Any, Any]:
    """A member, checked; where it is large, in memory of the file, which what is written there does not reach."""
    if item.file_size < _AT_ONCE:
        return archive.read(item)
    with archive.open(item) as member:
        while member.read(_AT_ONCE):  # which raises where its checksum is another one
            pass
    assert archive.fp is not None
    assert archive.filename is not None
    archive.fp.seek(item.header_offset + 26)
    start = item.header_offset + 30 + sum(struct.unpack("<HH", archive.fp.read(4)))  # name and extra field
    return np.memmap(archive.filename, np.uint8, "c", start, (item.file_size,))


def refuse_code(tree: Any) -> None:
    """Raise where a parsed JSON member makes torch unpickle, import or evaluate more than sympy's arithmetic."""
    if isinstance(tree, dict):
        if tree.get("use_pickle"):
            raise ArtifactError("it would make torch run code: 'a pickled tensor'.")
        if not _is_arithmetic(expression := tree.get("expr_str", "")):
            raise ArtifactError(f"it would make torch run code: {expression!r}.")
        refuse_code([*tree, *tree.values()])
    elif isinstance(tree, list):
        for value in tree:
            refuse_code(value)
    elif isinstance(tree, str) and _ENUM.search(tree):
        raise ArtifactError(f"it would make torch import a module: {tree[:100]!r}.")


def _is_arithmetic(expression: str) -> bool:
    """Whether an expression for a size calls nothing but sympy's classes and torch's own of that kind."""
    called = [size_function(name, getattr(sympy, name, None)) for name in _CALL.findall(expression)]
    only_classes = all(isinstance(each, type) and issubclass(each, sympy.Basic) for each in called)
    return only_classes and _ARITHMETIC.fullmatch(expression) is not None


def _refuse_odd_nodes(graph: fx.Graph) -> None:
    """Raise where a node takes an object that is no data, or reads a file."""
    for node in graph.nodes:
        odd = [leaf for leaf in pytree.tree_leaves((node.args, node.kwargs)) if not isinstance(leaf, _ARGUMENTS)]
        if odd or "from_file" in str(node.target):
            raise ArtifactError(f"node {node.name} ({node.target}) takes {odd or 'a file'}: not loaded.")
