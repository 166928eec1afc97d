"""One mode's graph as a `torch.export` program without weights, and back."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fxprune.capture.archives import read_program
from fxprune.capture.asserted_sizes import as_asserted
from fxprune.capture.lifting import lift_tensors, lifted_program
from fxprune.capture.unlifting import unlift
from fxprune.checkpoints.header import StoredGraph
from fxprune.graph.containers import Container
from fxprune.graph.editing import erase_dead
from fxprune.graph.metadata import tag, tag_of
from fxprune.graph.names import tensor_at
from fxprune.graph.traced import TracedModule
from fxprune.torch_internals import (
    FakeTensor,
    FakeTensorMode,
    fake_cpu_tensor,
    pytree_info,
)

_CPU = torch.device("cpu")
# the rest of a node's meta is of no use to a reader, and names source files of the machine
_KEPT_META = ("val", "nn_module_stack", "unbacked_bindings")


# ---- what programs do not keep


def stored_graph(graph: fx.Graph) -> StoredGraph:
    """The names of the inputs, and which nodes stand for parameters."""
    return StoredGraph(
        arguments=pytree_info(graph).orig_args,
        inputs=[node.name for node in graph.find_nodes(op="placeholder")],
        origins={_key(node): origin for node in graph.nodes if (origin := tag_of(node))},
    )


def _key(node: fx.Node) -> str:
    """What finds a node again: its name, which a program keeps, and the target of what reads a parameter."""
    return str(node.target) if node.op == "get_attr" else f"%{node.name}"


# ---- reading


def read_graph(content: bytes, root: Container, mode: str, stored: StoredGraph) -> fx.Graph:
    """The graph in a member of a checkpoint, reading its parameters from `root`, which gets the branches.

    Raises:
        ArtifactError: the program could run code.
    """
    graph = unlift(read_program(io.BytesIO(content)), root, mode, stored.arguments, lambda value, name: name)
    for node, name in zip(graph.find_nodes(op="placeholder"), stored.inputs, strict=True):
        node.name = node.target = name
    nodes = {_key(node): node for node in graph.nodes}
    for key, origin in stored.origins.items():
        tag(nodes[key], origin)
    erase_dead(graph)
    return graph


# ---- writing


def written_graph(traced: TracedModule, mode: str) -> bytes:
    """One mode's graph as the content of a `.pt2` file: on the CPU, with single zeros for weights."""
    program = _program(traced, mode)
    with as_asserted(program):
        torch.export.save(program, file := io.BytesIO())
    return file.getvalue()


def _program(traced: TracedModule, mode: str) -> ExportedProgram:
    """The steps that `torch.export.export` takes after capture, the other way round from `unlift`."""
    graph = copy.deepcopy(traced.graphs[mode])
    fakes = _Fakes.of(graph)
    fakes.move_to_cpu(graph)
    branches = _with_branches(traced, mode, graph, fakes)
    reads = {str(node.target) for node in graph.find_nodes(op="get_attr")} - branches._modules.keys()
    weights = {path: tensor_at(traced, path).detach() for path in reads}
    examples = {path: fakes.on_cpu(weight) for path, weight in weights.items()}
    paths = lift_tensors(graph, examples, branches._modules.keys())
    stand_ins = {path: _zeros(weights[path]) for path in paths.values()}
    return lifted_program(graph, branches, paths, stand_ins, fakes.mode)


@dataclass(frozen=True)
class _Fakes:
    """The mode that a graph's example values live in; torch refuses a program with values of two modes."""

    mode: FakeTensorMode

    @classmethod
    def of(cls, graph: fx.Graph) -> _Fakes:
        values = (node.meta.get("val") for node in graph.nodes)
        return cls(next((value.fake_mode for value in values if isinstance(value, FakeTensor)), FakeTensorMode()))

    def on_cpu(self, value: Tensor) -> FakeTensor:
        """A tensor without values, of the same sizes, strides and type."""
        return fake_cpu_tensor(self.mode, value)

    def move_to_cpu(self, graph: fx.Graph) -> None:
        """Let a graph run on the CPU, and take away the meta that no reader needs."""
        for node in graph.nodes:
            meta = {key: value for key, value in node.meta.items() if key in _KEPT_META}
            node.meta = pytree.tree_map_only(FakeTensor, self.on_cpu, meta)
            node.args, node.kwargs = pytree.tree_map_only(torch.device, lambda _: _CPU, (node.args, node.kwargs))


def _with_branches(traced: TracedModule, mode: str, graph: fx.Graph, fakes: _Fakes) -> nn.Module:
    """A root with the branches of control flow, under the names that they had before `unlift`."""
    root = nn.Module()
    for node in _last_first(graph.find_nodes(op="get_attr")):
        body = getattr(traced, str(node.target), None)
        if isinstance(body, fx.GraphModule):
            node.target = str(node.target).removeprefix(f"_{mode}_")
            copied = copy.deepcopy(body)
            root.add_module(node.target, copied)
            for part in copied.modules():
                fakes.move_to_cpu(part.graph)  # type: ignore[arg-type]
    return root


def _last_first(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    return list(reversed(list(nodes)))


def _zeros(value: Tensor) -> Tensor:
    """A stand-in that takes no room in the file."""
    if not value.numel():
        return value.detach().cpu()
    return torch.zeros((1,) * value.dim(), dtype=value.dtype).expand(value.shape)
