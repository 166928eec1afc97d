"""Programs of `torch.export` that others may have written: read without running code, taken as a captured module."""

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
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.pt2_archive._package import load_pt2
from torch.utils._sympy import functions

from fxprune.capture.unlifting import unlift
from fxprune.errors import ArtifactError
from fxprune.graph.containers import Container
from fxprune.graph.editing import erase_dead
from fxprune.graph.traced import TracedModule

_SAFE = re.compile(
    r"archive_format|archive_version|byteorder|\.\w+(/\w+)?|models/model\.json|data/sample_inputs/model\.pt|"
    r"data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
)
_ENUM = re.compile(r"__enum__|\\u00[2-7]")  # torch imports the module of an enumeration; JSON writers escape no ASCII
_ARITHMETIC = re.compile(r"([\w\s,=()+*/<>-]|\d\.\d|'\w+')*")
_DATA = (
    fx.Node, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format,
    torch.SymInt, torch.SymFloat, torch.SymBool, torch._ops.OpOverload,
)  # fmt: skip


def read_program(source: str | os.PathLike[str] | IO[bytes]) -> ExportedProgram:
    """The program in an archive of `torch.export.save`.

    `torch.export.load` unpickles some members, loads libraries, imports modules and evaluates expressions for sizes.
    What runs code that way is refused here, and torch gets a copy of the rest.

    Raises:
        ArtifactError: a member could run code, or is unknown. What torch raises for a damaged archive comes as it is.
    """
    copied = io.BytesIO()
    with zipfile.ZipFile(copied, "w") as archive:
        for name, content in read_members(source).items():
            inner = name.partition("/")[2]
            if inner.startswith("extra/"):  # anything, which nothing reads
                continue
            if not _SAFE.fullmatch(inner):
                raise ArtifactError(f"member {name!r} may hold pickles or libraries, which run code: not loaded.")
            if inner.endswith("model.pt") and content:
                torch.load(io.BytesIO(content), weights_only=True)  # where this fails, torch would unpickle anything
            elif inner.endswith(".json"):
                refuse_code(json.loads(content))
            archive.writestr(zipfile.ZipInfo(name), content)
    copied.seek(0)
    program = load_pt2(copied).exported_programs["model"]
    for node in (n for m in program.graph_module.modules() if isinstance(m, fx.GraphModule) for n in m.graph.nodes):
        odd = [a for a in pytree.tree_leaves((node.args, node.kwargs)) if not isinstance(a, _DATA)]
        if odd or "from_file" in str(node.target):
            raise ArtifactError(f"node {node.name} ({node.target}) takes {odd or 'a file'}: not loaded.")
    return program


def refuse_code(tree: Any) -> None:
    """Raise where a parsed JSON member makes torch unpickle, import or evaluate more than sympy's arithmetic."""
    if isinstance(tree, dict):
        expression = tree.get("expr_str", "")
        calls = [getattr(functions, n, getattr(sympy, n, None)) for n in re.findall(r"(\w+)\s*\(", expression)]
        known = all(isinstance(call, type) and issubclass(call, sympy.Basic) for call in calls)
        if tree.get("use_pickle") or not known or not _ARITHMETIC.fullmatch(expression):
            raise ArtifactError(f"it would make torch run code: {expression or 'a pickled tensor'!r}.")
        refuse_code([*tree, *tree.values()])
    elif isinstance(tree, list):
        for value in tree:
            refuse_code(value)
    elif isinstance(tree, str) and _ENUM.search(tree):
        raise ArtifactError(f"it would make torch import a module: {tree[:100]!r}.")


def from_program(program: ExportedProgram) -> TracedModule:
    """The eval graph of a program that others wrote, with names, sample inputs and free axes as it has them."""
    root, inputs = Container(), []
    specs = zip(program.graph.find_nodes(op="placeholder"), program.graph_signature.input_specs, strict=True)
    for node, spec in specs:
        if spec.target is None:
            inputs.append(node)
            continue
        owner: Any = root
        *path, attribute = spec.target.split(".")
        for name in path:
            owner = owner._modules.setdefault(name, Container())
        value = program.state_dict.get(spec.target, program.constants.get(spec.target))
        if isinstance(value, nn.Parameter):
            owner.register_parameter(attribute, value)
        else:
            owner.register_buffer(attribute, value, persistent=spec.target in program.state_dict)
    if program.example_inputs is None:
        raise ArtifactError("the program has no sample inputs. Store it by torch.export.save with its example_inputs.")
    sizes = [getattr(node.meta.get("val"), "shape", ()) for node in inputs]
    free = [{a: Dim.AUTO for a, s in enumerate(shape) if isinstance(s, torch.SymInt)} or None for shape in sizes]
    (args, kwargs), in_spec = program.example_inputs, program.call_spec.in_spec
    shapes, named = pytree.tree_unflatten(free, in_spec)
    names = [
        name if isinstance(name, str) else f"args_{i}"
        for i, name in enumerate(pytree.tree_unflatten([node.name for node in inputs], in_spec)[0])
    ] + list(named)
    graph = unlift(program, root, "eval", names, lambda value, name: name)
    erase_dead(graph)
    dynamic = dict(zip(names, [*shapes, *named.values()], strict=True)) if any(free) else None
    return TracedModule(root, {"eval": graph}, args, {name: kwargs[name] for name in named}, dynamic, training=False)


def is_program(members: Iterable[str]) -> bool:
    """Whether an archive with these members is one of `torch.export.save`."""
    return any(name.endswith("/archive_format") for name in members)


def read_members(source: str | os.PathLike[str] | IO[bytes]) -> dict[str, bytes]:
    """The members of an uncompressed archive by name; raises ArtifactError where it is cut or ambiguous."""
    with zipfile.ZipFile(source) as archive:
        items = archive.infolist()
        if items and items[0].header_offset:  # cut inside a program, whose own archive is then found
            raise ArtifactError("the file is truncated: what is left ends in another archive. Write it again.")
        if len(set(archive.namelist())) < len(items) or any(item.compress_type for item in items):
            raise ArtifactError("the archive has members twice, or compressed; fxprune and torch write neither.")
        return {name: archive.read(name) for name in archive.namelist()}
