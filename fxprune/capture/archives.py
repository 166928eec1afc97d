"""Archives that others may have written: members and `torch.export` programs, read without running code."""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from collections.abc import Iterable
from typing import IO, Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.export import ExportedProgram

from fxprune.errors import ArtifactError
from fxprune.torch_internals import OpOverload, load_pt2, size_function

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
        items = archive.infolist()
        if items and items[0].header_offset:  # cut inside a program, whose own archive is then found
            raise ArtifactError("the file is truncated: what is left ends in another archive. Write it again.")
        if len(set(archive.namelist())) < len(items) or any(item.compress_type for item in items):
            raise ArtifactError("the archive has members twice, or compressed; fxprune and torch write neither.")
        return {name: archive.read(name) for name in archive.namelist()}


def is_program(members: Iterable[str]) -> bool:
    """Whether an archive with these members is one of `torch.export.save`."""
    return any(name.endswith("/archive_format") for name in members)


def read_program(source: Source) -> ExportedProgram:
    """The program in an archive of `torch.export.save`.

    `torch.export.load` unpickles some members, loads libraries, imports modules and evaluates expressions for sizes.
    What runs code that way is refused here, and torch gets a copy of the rest.

    Raises:
        ArtifactError: a member could run code, or is unknown. What torch raises for a damaged archive comes as it is.
    """
    program = load_pt2(_harmless_copy(read_members(source))).exported_programs["model"]
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            _refuse_odd_nodes(module.graph)
    return program


def _harmless_copy(members: dict[str, bytes]) -> io.BytesIO:
    """An archive of the members that torch reads as data alone; raises ArtifactError where there are others."""
    copied = io.BytesIO()
    with zipfile.ZipFile(copied, "w") as archive:
        for name, content in members.items():
            _, _, inner = name.partition("/")
            if inner.startswith("extra/"):  # anything, which nothing reads
                continue
            if not _SAFE_MEMBER.fullmatch(inner):
                raise ArtifactError(f"member {name!r} may hold pickles or libraries, which run code: not loaded.")
            if inner.endswith("model.pt") and content:
                torch.load(io.BytesIO(content), weights_only=True)  # where this fails, torch would unpickle anything
            elif inner.endswith(".json"):
                refuse_code(json.loads(content))
            archive.writestr(zipfile.ZipInfo(name), content)
    copied.seek(0)
    return copied


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
