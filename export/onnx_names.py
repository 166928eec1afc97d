"""The names in an ONNX file: of weights, inputs, outputs and free sizes, and of the nodes that values come from."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

import onnx_ir
from onnxscript.optimizer import FOLDED_FROM_KEY
from torch.onnx import ONNXProgram

from fxprune.errors import ArgumentError

from .node_values import ORIGIN


def keep_lost_initializers(program: ONNXProgram) -> None:
    """Put initializers back that others of the same name took the place of.

    The optimizer names the bounds that it joins by what is clamped: where several clamps share that, one name stands
    for the bounds of all, and the graph holds those of the last alone.
    """
    graph = program.model.graph
    for node in graph.all_nodes():
        for value in node.inputs:
            if value is None or value.producer() is not None or value.is_graph_input() or value.const_value is None:
                continue
            if (holder := value.graph or graph).initializers.get(str(value.name)) is not value:
                while value.name in holder.initializers:
                    value.name = f"{value.name}_again"
                holder.register_initializer(value)


def name_weights(program: ONNXProgram, parameters: dict[str, str]) -> None:
    """Give the initializers the names of the state dict, also what the optimizer made of a single parameter.

    Args:
        parameters: the names of the state dict, by those of the module that was exported.
    """
    graph = program.model.graph
    for name, value in list(graph.initializers.items()):
        sources = {name, *ast.literal_eval(value.metadata_props.get(FOLDED_FROM_KEY, "[]"))} & parameters.keys()
        if len(sources) == 1 and (parameter := parameters[sources.pop()]) not in graph.initializers:
            value.name = parameter


def name_origins(program: ONNXProgram) -> None:
    """Let each node say which traced node's value it computes; of a decomposed one that is the last."""
    assert program.exported_program is not None
    origins = {node.name: node.meta.get("custom", {}).get(ORIGIN) for node in program.exported_program.graph.nodes}
    last = {origins.get(str(value.name)): node for node in program.model.graph for value in node.outputs}
    for origin, node in last.items():
        if origin:
            node.metadata_props[ORIGIN] = origin


def name_ends(
    program: ONNXProgram, defaults: list[str], inputs: Sequence[str] | None, outputs: Sequence[str] | None
) -> None:
    """Give inputs and outputs the caller's names; None: the captured ones for inputs, `defaults` for outputs.

    Raises:
        ArgumentError: their number is another one, or they are not distinct from each other and from the weights.
    """
    graph = program.model.graph
    weights = set(graph.initializers) - {value.name for value in graph.outputs}
    inputs = inputs or [str(value.name) for value in graph.inputs]
    if outputs is None:
        outputs = _distinct(defaults, taken=weights.union(inputs))
    names, ends = [*inputs, *outputs], [*graph.inputs, *graph.outputs]
    fits = len(inputs) == len(graph.inputs) and len(names) == len(ends) == len(set(names))
    if not fits or weights.intersection(names):
        raise ArgumentError(
            f"input_names {list(inputs)} and output_names {list(outputs)} cannot be used: the model has "
            f"{len(graph.inputs)} inputs and {len(graph.outputs)} outputs, and names must differ from each other and "
            f"from the parameters' ({', '.join(sorted(weights.intersection(names))) or 'as they do'})."
        )
    inner = [value for node in graph.all_nodes() for value in node.outputs if value.name in names]
    for i, value in enumerate([*inner, *ends]):
        value.name = f"fxprune_{i}"  # first out of each other's way
    for value, name in zip(ends, names, strict=True):
        value.name = name


def _distinct(names: list[str], taken: set[str]) -> list[str]:
    """The names, with a suffix for what is taken or occurs before."""
    return [f"{name}_out" if name in taken or name in names[:i] else name for i, name in enumerate(names)]


def name_free_sizes(program: ONNXProgram) -> None:
    """Call the first free size of an axis 0 `batch`, and others by the input and axis where they first stand."""
    names: dict[str | onnx_ir.SymbolicDim, str] = {}
    for value in program.model.graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            symbol = str(size)
            if not re.fullmatch(r"[su]\d+", symbol) or symbol in names:
                continue
            is_batch = axis == 0 and "batch" not in names.values()
            names[symbol] = "batch" if is_batch else f"{value.name}_{axis}"
    program.rename_axes(names)


def drop_stack_traces(program: ONNXProgram) -> None:
    """They are absolute paths of this machine's sources."""
    for node in program.model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
