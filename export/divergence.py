"""Where two computations part: the first node whose values differ, and a script that shows it alone."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import torch.utils._pytree as pytree
from onnx import helper
from safetensors.torch import save
from torch import fx, nn

from fxprune.capture.front_end import trace
from fxprune.files import atomic
from fxprune.graph.text import module_path
from fxprune.graph.traced import TracedModule

from .session import Session

ORIGIN = "fxprune.node"  # metadata of an ONNX node: the traced node whose value it computes


@dataclass(frozen=True)
class Divergence:
    """The first node whose value differs by more than the tolerance.

    Attributes:
        candidate, call: which candidate, on which of the inputs. node: the name that both sides know it by.
        operator, module: of the reference; `found_operator`: of the candidate. shape: of the value.
        index: where the difference is largest; reference, found: both values there.
    """

    candidate: str
    call: int
    node: str
    operator: str
    found_operator: str
    module: str
    shape: tuple[int, ...]
    index: tuple[int, ...]
    reference: float
    found: float
    pieces: tuple[Any, ...] = field(default=(), repr=False, compare=False)

    def __str__(self) -> str:
        where = f" in {self.module}" if self.module else ""
        return (
            f"first difference of {self.candidate}: node `{self.node}` ({self.operator}{where}; there "
            f"{self.found_operator}), shape {list(self.shape)}, at {list(self.index)}: {self.reference:.9g} in the "
            f"reference, {self.found:.9g} here"
        )

    def reproduce(self, path: str | os.PathLike[str]) -> None:
        """Write a script of the smallest subgraph that differs; its inputs and weights go beside it."""
        target, sides = Path(path), ""
        files: dict[Path, bytes] = {}
        tensors: dict[str, torch.Tensor] = {}
        for side, (body, values, model) in zip(("reference", "candidate"), self.pieces, strict=True):
            named = {name.replace("SIDE", side, 1): value for name, value in values.items()}
            tensors |= named
            if model:
                files[target.with_name(f"{target.stem}.{side}.onnx")] = model
            call = ", ".join(f"tensors[{name!r}]" for name in named)
            sides += f"\n\n{body.replace('SIDE', side)}\n\n{side}_value = {side}({call}).double()\n"
        data = target.with_suffix(".safetensors")
        files[data] = save({name: value.contiguous().clone() for name, value in tensors.items()})
        files[target] = _SCRIPT.format(what=self, data=data.name, sides=sides).encode()
        for name, content in files.items():
            with atomic(name) as draft:
                draft.write_bytes(content)


_SCRIPT = '''"""{what}."""

from pathlib import Path

import onnxruntime
import torch
from safetensors.torch import load_file
from torch import device, inf, nan

here = Path(__file__).parent
tensors = load_file(here / "{data}")
{sides}
difference = (candidate_value - reference_value).abs()
print(f"largest difference {{difference.max():.3e}}, largest value {{reference_value.abs().max():.3e}}")
'''


def find(reference: Any, candidate: Any, call: Any, index: int, agrees: Any) -> Divergence | None:
    """The first node, in the reference's order, of which `agrees(reference value, candidate value)` is false.

    None where one side has no nodes, no names are shared, or all values agree.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            left, right = (_values(runner, call) for runner in (reference, candidate))
    except Exception:  # a search that fails must not hide the difference that it was to explain
        return None
    shared: set[str] = set()
    if left is None or right is None:
        return None
    for name in left.values:
        if name not in left.computed or name not in right.values:
            continue
        a, b = left.values[name], right.values[name].to(left.values[name].dtype)
        if a.shape != b.shape:
            continue
        if agrees(a, b):
            shared.add(name)
            continue
        worst = int((a.double() - b.double()).abs().nan_to_num(nan=torch.inf).argmax())
        at = tuple(int(i) for i in np.unravel_index(worst, a.shape))
        (operator, module), (other, _) = left.computed[name], right.computed[name]
        pieces = tuple(side.piece(name, shared, left.values) for side in (left, right))
        return Divergence(
            candidate.name, index, name, operator, other, module, tuple(a.shape), at, float(a[at]), float(b[at]), pieces
        )  # fmt: skip
    return None


def _values(runner: Any, call: Any) -> _Graph | _Onnx | None:
    if isinstance(runner, Session):
        return _Onnx(runner, call)
    module = runner.module
    if isinstance(module, torch.jit.ScriptModule):
        return None
    if not isinstance(module, fx.GraphModule):
        module = trace(module, *call, dynamic_shapes=None, modes=("eval",))
    return _Graph(module, call)


class _Graph:
    """The values of a graph module's nodes by name."""

    def __init__(self, module: fx.GraphModule, call: Any) -> None:
        graph = module.graphs["eval"] if isinstance(module, TracedModule) else module.graph
        self.nodes = {node.name: node for node in graph.nodes}
        self.computed = {n.name: (str(n.target), module_path(n)) for n in graph.nodes if n.op == "call_function"}
        self.values: dict[str, torch.Tensor] = {}
        names = graph._codegen.pytree_info.orig_args  # type: ignore[attr-defined]
        bound = dict(zip(names, call[0], strict=False)) | call[1]
        leaves = pytree.tree_map_only(torch.Tensor, torch.clone, pytree.tree_leaves([bound[name] for name in names]))
        self.inputs = dict(zip(graph.find_nodes(op="placeholder"), leaves, strict=True))
        values = self.values

        class Recorder(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                result = super().run_node(n)
                if isinstance(result, torch.Tensor):
                    values[n.name] = result.detach().cpu().clone()
                return result

        Recorder(module, graph=graph).run(*leaves, enable_io_processing=False)

    def piece(self, name: str, shared: set[str], values: dict[str, torch.Tensor]) -> tuple[Any, ...]:
        graph, tensors, copies = fx.Graph(), dict[str, torch.Tensor](), dict[fx.Node, Any]()

        def copy(node: fx.Node) -> Any:
            if node not in copies:
                if node in self.inputs and not isinstance(self.inputs[node], torch.Tensor):
                    copies[node] = self.inputs[node]
                elif node.name in shared or node.op in ("placeholder", "get_attr"):
                    key = node.name if node.name in shared else f"SIDE.{node.name}"
                    tensors[key] = (values if node.name in shared else self.values)[node.name]
                    copies[node] = graph.placeholder(node.name)
                else:
                    for source in node.all_input_nodes:
                        copy(source)
                    copies[node] = graph.node_copy(node, copies.__getitem__)
            return copies[node]

        graph.output(copy(self.nodes[name]))
        code = fx.GraphModule(nn.Module(), graph).code.strip().replace("def forward(self, ", "def SIDE(")
        return code.replace("def forward(self)", "def SIDE()"), tensors, b""


class _Onnx:
    """The values of an ONNX file's nodes, by the traced node's name where the file states it."""

    def __init__(self, session: Session, call: Any) -> None:
        self.model = onnx.load(session.path)
        graph = self.model.graph
        self.names: dict[str, str] = {}
        self.computed: dict[str, tuple[str, str]] = {}
        for node in graph.node:
            origin = [entry.value for entry in node.metadata_props if entry.key == ORIGIN]
            name = (origin or node.output)[0]
            self.names[name], self.computed[name] = node.output[0], (node.op_type, "")
        known = {value.name for value in graph.output}
        wider = onnx.ModelProto()
        wider.CopyFrom(self.model)
        values = list(self.names.values())
        wider.graph.output.extend(onnx.ValueInfoProto(name=value) for value in values if value not in known)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        run = onnxruntime.InferenceSession(wider.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.feed = session.feed(*call)
        found = dict(zip(values, run.run(values, self.feed), strict=True))
        self.values = {name: torch.from_numpy(np.array(found[value])) for name, value in self.names.items()}

    def piece(self, name: str, shared: set[str], values: dict[str, torch.Tensor]) -> tuple[Any, ...]:
        graph, target = self.model.graph, self.names[name]
        producers = {value: node for node in graph.node for value in node.output}
        given = {self.names[n]: (n, values[n]) for n in shared if n in self.names}
        given |= {n: (f"SIDE.{n}", torch.from_numpy(array)) for n, array in self.feed.items()}
        stops: dict[str, tuple[str, torch.Tensor]] = {}
        taken: list[onnx.NodeProto] = []
        need = [target]
        while need:
            value = need.pop()
            if value in given:
                stops[value] = given[value]
            elif value in producers and producers[value] not in taken:
                taken.append(producers[value])
                need += producers[value].input
        used = {value for node in taken for value in node.input}
        ends = [
            helper.make_tensor_value_info(value, helper.np_dtype_to_tensor_dtype(tensor.numpy().dtype), tensor.shape)
            for value, (_, tensor) in stops.items()
        ]
        small = helper.make_graph(
            [node for node in graph.node if node in taken], name, ends, [onnx.ValueInfoProto(name=target)],
            [t for t in graph.initializer if t.name in used],
            sparse_initializer=[t for t in graph.sparse_initializer if t.values.name in used],
        )  # fmt: skip
        model = helper.make_model(small, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)
        body = (
            "def SIDE(*values):\n"
            '    session = onnxruntime.InferenceSession(here / (Path(__file__).stem + ".SIDE.onnx"))\n'
            f"    feed = {{n: v.numpy() for n, v in zip({json.dumps(list(stops))}, values)}}\n"
            "    return torch.from_numpy(session.run(None, feed)[0])"
        )
        return body, dict(stops.values()), model.SerializeToString()
