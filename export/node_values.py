"""The values of all nodes in one call, by name: of a captured graph and of an ONNX file; and pieces cut out of both."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import onnx
import onnxruntime
import torch
import torch.utils._pytree as pytree
from onnx import helper
from torch import fx, nn

from fxprune.capture.front_end import trace
from fxprune.errors import CompareError
from fxprune.graph.arguments import Signature
from fxprune.graph.calls import Call
from fxprune.graph.interpretation import run
from fxprune.graph.metadata import module_path
from fxprune.graph.traced import TracedModule
from fxprune.sharding import is_sharded, whole

from .float64 import WidenedRunner
from .runners import ModuleRunner, ProgramRunner, Runner
from .session import Session, session_options

ORIGIN = "fxprune.node"  # metadata of an ONNX node: the traced node whose value it computes


class Computed(NamedTuple):
    """What computes a value: an operator, in a module where that is known."""

    operator: str
    module: str


@dataclass(frozen=True)
class Piece:
    """A part of a graph as a function of given tensors, for a script; "SIDE" stands for the name of the side.

    Attributes:
        code: the function's definition. tensors: its arguments in order, by name. model: an ONNX file that it runs.
    """

    code: str
    tensors: dict[str, torch.Tensor]
    model: bytes = b""


class NodeValues(Protocol):
    """The values of one call.

    Attributes:
        values: on the CPU, by name, in the order of the computation. computed: by what, for those that nodes compute.
    """

    values: dict[str, torch.Tensor]
    computed: dict[str, Computed]

    def piece(self, name: str, given: Mapping[str, torch.Tensor]) -> Piece:
        """What computes the value `name` from the values `given`, inputs, and parameters."""


def node_values(runner: Runner, call: Call) -> NodeValues | None:
    """The values of all nodes that a runner computes for a call; None for TorchScript, which keeps no names."""
    if isinstance(runner, Session):
        return OnnxValues(runner, call)
    assert isinstance(runner, ModuleRunner | ProgramRunner)
    if isinstance(runner.module, torch.jit.ScriptModule):
        return None
    if isinstance(runner, WidenedRunner) and isinstance(runner.module, fx.GraphModule):
        with runner.widening():
            return GraphValues(runner.module, runner.widened(call))
    if isinstance(runner.module, fx.GraphModule):
        return GraphValues(runner.module, call)
    return GraphValues(trace(runner.module, *call, dynamic_shapes=None, modes=("eval",)), call)


def _read(module: nn.Module, target: str) -> Any:
    """What a graph reads by name; a collective where it is spread over processes, which search together."""
    found = operator.attrgetter(target)(module)
    return whole(found) if is_sharded(found) else found


class GraphValues:
    """The values of a graph module's nodes by the nodes' names, in eval mode."""

    def __init__(self, module: fx.GraphModule, call: Call) -> None:
        graph = module.graphs["eval"] if isinstance(module, TracedModule) else module.graph
        self.nodes = {node.name: node for node in graph.nodes}
        self.computed = {
            node.name: Computed(str(node.target), module_path(node))
            for node in graph.nodes
            if node.op == "call_function"
        }
        self.values: dict[str, torch.Tensor] = {}
        bound = Signature.of(graph).bind(*call)
        if bound is None:
            raise CompareError(f"the call has other arguments than the captured {Signature.of(graph).names}")
        leaves = pytree.tree_map_only(torch.Tensor, torch.clone, pytree.tree_leaves(list(bound.values())))
        self.inputs = dict(zip(graph.find_nodes(op="placeholder"), leaves, strict=True))
        run(graph, lambda target: _read(module, target), leaves, watch=self._keep)

    def _keep(self, node: fx.Node, value: object) -> None:
        if isinstance(value, torch.Tensor):
            self.values[node.name] = value.detach().cpu().clone()

    def piece(self, name: str, given: Mapping[str, torch.Tensor]) -> Piece:
        """The nodes between the value `name` and the values `given`, as Python."""
        target = self.nodes[name]
        needed = self._needed(target, given)
        piece_graph = fx.Graph()
        copies: dict[fx.Node, Any] = {}
        tensors: dict[str, torch.Tensor] = {}
        for node in target.graph.nodes:
            if node not in needed:
                continue
            if node in self.inputs and not isinstance(self.inputs[node], torch.Tensor):
                copies[node] = self.inputs[node]
            elif node.name in given:
                tensors[node.name] = given[node.name]
                copies[node] = piece_graph.placeholder(node.name)
            elif node.op in ("placeholder", "get_attr"):
                tensors[f"SIDE.{node.name}"] = self.values[node.name]
                copies[node] = piece_graph.placeholder(node.name)
            else:
                copies[node] = piece_graph.node_copy(node, copies.__getitem__)
        piece_graph.output(copies[target])
        code = fx.GraphModule(nn.Module(), piece_graph).code.strip()
        code = code.replace("def forward(self, ", "def SIDE(").replace("def forward(self)", "def SIDE()")
        return Piece(code, tensors)

    def _needed(self, target: fx.Node, given: Mapping[str, torch.Tensor]) -> set[fx.Node]:
        """`target` and what it is computed from, up to the values that are given."""
        needed = {target}
        waiting = [target]
        while waiting:
            node = waiting.pop()
            if node.name in given:
                continue
            fresh = [source for source in node.all_input_nodes if source not in needed]
            needed.update(fresh)
            waiting += fresh
        return needed


class OnnxValues:
    """The values of an ONNX file's nodes, by the traced node's name where the file states it."""

    def __init__(self, session: Session, call: Call) -> None:
        self.model = onnx.load(session.path)
        self.value_names: dict[str, str] = {}  # in the file
        self.computed: dict[str, Computed] = {}
        for node in self.model.graph.node:
            origin = [entry.value for entry in node.metadata_props if entry.key == ORIGIN]
            name = (origin or node.output)[0]
            self.value_names[name], self.computed[name] = node.output[0], Computed(node.op_type, "")
        self.feed = session.feed(*call)
        found = self._run(list(self.value_names.values()))
        self.values = {name: found[value] for name, value in self.value_names.items()}

    def _run(self, values: list[str]) -> dict[str, torch.Tensor]:
        """The file run with all of `values` as its outputs."""
        wider = onnx.ModelProto()
        wider.CopyFrom(self.model)
        outputs = {value.name for value in wider.graph.output}
        wider.graph.output.extend(onnx.ValueInfoProto(name=value) for value in values if value not in outputs)
        session = onnxruntime.InferenceSession(
            wider.SerializeToString(), session_options(), providers=["CPUExecutionProvider"]
        )
        arrays = session.run(values, self.feed)
        return {value: torch.from_numpy(np.array(array)) for value, array in zip(values, arrays, strict=True)}

    def piece(self, name: str, given: Mapping[str, torch.Tensor]) -> Piece:
        """The nodes between the value `name` and the values `given`, as a file of their own."""
        known = {self.value_names[n]: (n, value) for n, value in given.items() if n in self.value_names}
        known |= {value: (f"SIDE.{value}", torch.from_numpy(array)) for value, array in self.feed.items()}
        target = self.value_names[name]
        nodes, ends = self._between(target, known.keys())
        inputs = {value: known[value] for value in ends}
        model = self._submodel(name, nodes, {value: tensor for value, (_, tensor) in inputs.items()}, target)
        code = (
            "def SIDE(*values):\n"
            '    session = onnxruntime.InferenceSession(here / (Path(__file__).stem + ".SIDE.onnx"))\n'
            f"    feed = {{n: v.numpy() for n, v in zip({json.dumps(list(inputs))}, values)}}\n"
            "    return torch.from_numpy(session.run(None, feed)[0])"
        )
        return Piece(code, dict(inputs.values()), model.SerializeToString())

    def _between(self, target: str, known: Set[str]) -> tuple[list[onnx.NodeProto], list[str]]:
        """The nodes that compute the value `target` from values that are known, in order, and those values."""
        nodes = list(self.model.graph.node)
        producers = {value: i for i, node in enumerate(nodes) for value in node.output}
        taken: set[int] = set()
        ends: dict[str, None] = {}  # in the order in which they are met
        waiting = [target]
        while waiting:
            value = waiting.pop()
            if value in known:
                ends[value] = None
            elif value in producers and producers[value] not in taken:
                taken.add(producers[value])
                waiting += nodes[producers[value]].input
        return [nodes[i] for i in sorted(taken)], list(ends)

    def _submodel(
        self, name: str, nodes: list[onnx.NodeProto], inputs: dict[str, torch.Tensor], output: str
    ) -> onnx.ModelProto:
        graph = self.model.graph
        used = {value for node in nodes for value in node.input}
        ends = [
            helper.make_tensor_value_info(value, helper.np_dtype_to_tensor_dtype(tensor.numpy().dtype), tensor.shape)
            for value, tensor in inputs.items()
        ]
        submodel = helper.make_graph(
            nodes,
            name,
            ends,
            [onnx.ValueInfoProto(name=output)],
            [tensor for tensor in graph.initializer if tensor.name in used],
            sparse_initializer=[tensor for tensor in graph.sparse_initializer if tensor.values.name in used],
        )
        return helper.make_model(submodel, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)
