"""A graph that reads its tensors as a `torch.export` program that takes them as inputs: `unlift` the other way.

These are the steps that `torch.export.export` takes after capture.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import ExportedProgram, exported_program, graph_signature
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, OutputSpec

from fxprune.torch_internals import FakeTensorMode, TrainingIRVerifier, pytree_info, symbol_ranges


def lift_tensors(graph: fx.Graph, examples: Mapping[str, Tensor], branches: Collection[str] = ()) -> dict[str, str]:
    """Let inputs in front of the others stand for the tensors that a graph reads.

    Args:
        graph: changed in place.
        examples: for each path that it reads, the fake tensor that its input is to record.
        branches: paths of branches of control flow, which stay reads.

    Returns:
        The paths by the names of their inputs.
    """
    inputs: dict[str, fx.Node] = {}
    for node in _last_first(graph.find_nodes(op="get_attr")):
        path = str(node.target)
        if path in branches:
            continue
        if path not in inputs:
            with graph.inserting_before():
                inputs[path] = graph.placeholder(f"p{len(inputs)}")
            inputs[path].meta["val"] = examples[path]
        node.replace_all_uses_with(inputs[path])
        graph.erase_node(node)
    return {node.name: path for path, node in inputs.items()}


def _last_first(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    return list(reversed(list(nodes)))


def lifted_program(
    graph: fx.Graph,
    root: nn.Module,
    paths: Mapping[str, str],
    state: Mapping[str, Tensor],
    mode: FakeTensorMode,
    kind: type[ExportedProgram] = ExportedProgram,
) -> ExportedProgram:
    """The program of a graph whose tensors are lifted.

    Args:
        graph: what `lift_tensors` left, with a pytree signature. The program takes it over.
        root: holds the branches of control flow.
        paths: what `lift_tensors` gave.
        state: the tensors by path.
        mode: of the fake tensors that the graph records.
        kind: the class of the program.
    """
    info = pytree_info(graph)
    call = exported_program.ModuleCallSignature([], [], info.in_spec, info.out_spec)  # type: ignore[arg-type]
    return kind(
        root=root,
        graph=graph,
        graph_signature=graph_signature.ExportGraphSignature(_input_specs(graph, paths), _output_specs(graph)),
        state_dict=dict(state),
        range_constraints=_ranges(graph, mode),
        module_call_graph=[exported_program.ModuleCallEntry("", call)],
        verifiers=[TrainingIRVerifier],
    )


def _input_specs(graph: fx.Graph, paths: Mapping[str, str]) -> list[InputSpec]:
    specs = []
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        argument = _argument(node) if isinstance(value, Tensor) else graph_signature.ConstantArgument(node.name, value)
        if node.name in paths:
            specs.append(InputSpec(InputKind.BUFFER, argument, paths[node.name], persistent=True))
        else:
            specs.append(InputSpec(InputKind.USER_INPUT, argument, None))
    return specs


def _output_specs(graph: fx.Graph) -> list[OutputSpec]:
    leaves: Any = graph.output_node().args[0]
    arguments = [
        _argument(leaf) if isinstance(leaf, fx.Node) else graph_signature.ConstantArgument("", leaf) for leaf in leaves
    ]
    return [OutputSpec(OutputKind.USER_OUTPUT, argument, None) for argument in arguments]


def _argument(node: fx.Node) -> graph_signature.TensorArgument:
    return graph_signature.TensorArgument(node.name)


def _ranges(graph: fx.Graph, mode: FakeTensorMode) -> dict[Any, Any]:
    """The symbols in the sizes of all values, also of those that come of data, and the range of each."""
    values = [leaf for node in graph.nodes for leaf in pytree.tree_leaves(node.meta.get("val"))]
    sizes = [size for value in values if isinstance(value, Tensor) for size in value.shape]
    return symbol_ranges(mode, [*sizes, *(value for value in values if isinstance(value, torch.SymInt))])
