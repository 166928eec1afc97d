"""Programs of `torch.export` that others wrote, taken as captured modules."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.export import Dim, ExportedProgram

from fxprune.capture.unlifting import unlift
from fxprune.errors import ArtifactError
from fxprune.graph.containers import Container
from fxprune.graph.editing import erase_dead
from fxprune.graph.traced import TracedModule


def from_program(program: ExportedProgram) -> TracedModule:
    """The eval graph of a program, with names, sample inputs and free axes as it has them.

    Raises:
        ArtifactError: the program has no sample inputs.
    """
    if program.example_inputs is None:
        raise ArtifactError("the program has no sample inputs. Store it by torch.export.save with its example_inputs.")
    (args, kwargs), structure = program.example_inputs, program.call_spec.in_spec
    root, inputs = Container(), input_nodes(program)
    _hold_tensors(program, root)
    by_position, by_name = pytree.tree_unflatten([node.name for node in inputs], structure)
    names = [name if isinstance(name, str) else f"args_{i}" for i, name in enumerate(by_position)] + list(by_name)
    free = [_free_axes(node) for node in inputs]
    shapes, named_shapes = pytree.tree_unflatten(free, structure)
    dynamic = dict(zip(names, [*shapes, *named_shapes.values()], strict=True)) if any(free) else None
    graph = unlift(program, root, "eval", names, lambda value, name: name)
    erase_dead(graph)
    return TracedModule(root, {"eval": graph}, args, {name: kwargs[name] for name in by_name}, dynamic, training=False)


def input_nodes(program: ExportedProgram) -> list[fx.Node]:
    """The placeholders that stand for what the program is called with, not for tensors that it holds."""
    nodes = program.graph.find_nodes(op="placeholder")
    specs = program.graph_signature.input_specs
    return [node for node, spec in zip(nodes, specs, strict=True) if spec.target is None]


def _hold_tensors(program: ExportedProgram, root: Container) -> None:
    """Give `root` the parameters, buffers and constants of a program, under their names."""
    for spec in program.graph_signature.input_specs:
        if spec.target is None:
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


def _free_axes(node: fx.Node) -> dict[int, Any] | None:
    """The free axes of an input, None where all its sizes are fixed."""
    shape = getattr(node.meta.get("val"), "shape", ())
    return {axis: Dim.AUTO for axis, size in enumerate(shape) if isinstance(size, torch.SymInt)} or None
