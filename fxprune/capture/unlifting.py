"""Exported programs un-lifted: parameters and buffers, which they take as inputs, read by `get_attr` nodes again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from fxprune.errors import CaptureError
from fxprune.graph.codegen import CodeGen
from fxprune.graph.containers import Container
from fxprune.graph.editing import inline_no_grad_regions
from fxprune.graph.mutation import written_into
from fxprune.torch_internals import PyTreeInfo

_READ = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_RETURNED = (OutputKind.USER_OUTPUT, OutputKind.BUFFER_MUTATION)


def unlift(
    program: ExportedProgram,
    root: Container,
    mode: str,
    names: Sequence[str],
    keep_constant: Callable[[Tensor, str], str],
) -> fx.Graph:
    """The graph of a program with its parameters and buffers read from `root`; the program's own graph is used up.

    Args:
        program: of one mode, "train" or "eval".
        root: what holds the parameters and buffers; it gets the bodies of control flow.
        mode: tells the bodies of two modes apart.
        names: of the arguments.
        keep_constant: called with a tensor that the program holds itself, and its name; returns where it is held.

    Raises:
        CaptureError: the program reads or returns something that is no tensor.
    """
    graph: fx.Graph = program.graph
    for part in program.graph_module.modules():
        if isinstance(part, fx.GraphModule):
            _complete_users(part.graph)
    _read_inputs_of_state(graph, program, keep_constant)
    if any(spec.kind not in _RETURNED for spec in program.graph_signature.output_specs):
        raise CaptureError("the model returns something else than tensors and constants.")
    inline_no_grad_regions(graph, program.graph_module)
    _hold_branches(graph, program, root, mode)
    _erase_assertions(graph)
    _write_assigned(graph)
    spec = program.call_spec
    graph.set_codegen(CodeGen(PyTreeInfo(list(names), spec.in_spec, spec.out_spec)))
    return graph


def _complete_users(graph: fx.Graph) -> None:
    """Let every node know what reads it: where torch.export has made regions of nodes, it may have lost readers."""
    for node in graph.nodes:
        for operand in node.all_input_nodes:
            operand.users.setdefault(node)


def _read_inputs_of_state(
    graph: fx.Graph, program: ExportedProgram, keep_constant: Callable[[Tensor, str], str]
) -> None:
    """Replace the inputs that stand for parameters, buffers and constants by reads."""
    specs = program.graph_signature.input_specs
    for node, spec in zip(graph.find_nodes(op="placeholder"), specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            continue
        if spec.kind not in _READ:
            raise CaptureError(f"the model reads {spec.target!r} ({spec.kind.name}), which is no tensor.")
        target = str(spec.target)
        if spec.kind is InputKind.CONSTANT_TENSOR:
            target = keep_constant(program.constants[target], target)
        if node.users:
            with graph.inserting_before(node):
                read = graph.create_node("get_attr", target, name=target.replace(".", "_"))
            read.meta = dict(node.meta)
            node.replace_all_uses_with(read)
        graph.erase_node(node)


def _hold_branches(graph: fx.Graph, program: ExportedProgram, root: Container, mode: str) -> None:
    """Let `root` hold the bodies of control flow, which the graph reads by name."""
    for node in graph.find_nodes(op="get_attr"):
        body = getattr(program.graph_module, str(node.target), None)
        if isinstance(body, fx.GraphModule):
            node.target = f"_{mode}_{node.target}"
            root.add_module(node.target, body)
            _erase_assertions(body.graph)
            body.recompile()


def _erase_assertions(graph: fx.Graph) -> None:
    """Take out what asserts the dtypes of the capture: the graph runs in others, too."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        graph.erase_node(node)


def _write_assigned(graph: fx.Graph) -> None:
    """Let `self.buffer = value`, which torch.export makes a last write into the buffer, spare what read it before.

    In eager the name gets another tensor. Here the old one is written into, which would change what the forward returns
    of it and what the backward pass has saved: these read a copy. `self.buffer += 1` has written already: a second
    write, of the same, would fail the backward pass.
    """
    for write in _writes_of_assignments(graph):
        read, value = write.all_input_nodes[0], write.all_input_nodes[-1]
        if written_into(value) is read:
            graph.erase_node(write)
        elif _is_read_beside(read, write):
            with graph.inserting_after(read):
                copy = graph.call_function(torch.ops.aten.clone.default, (read,))
            copy.meta = dict(read.meta)
            read.replace_all_uses_with(copy, lambda user, own=(copy, write): user not in own)  # type: ignore[misc]


def _writes_of_assignments(graph: fx.Graph) -> list[fx.Node]:
    """The writes at the end that stand for assignments; they carry the metadata of what was assigned."""
    found = []
    node = graph.output_node().prev
    while node.target is torch.ops.aten.copy_.default:
        if node.meta.get("torch_fn") != node.all_input_nodes[-1].meta.get("torch_fn"):
            break  # one of the model's own
        found.append(node)
        node = node.prev
    return found


def _is_read_beside(read: fx.Node, write: fx.Node) -> bool:
    """Whether something of a buffer goes elsewhere than into what is assigned to it."""
    waiting, seen = [read], {write}
    while waiting:
        for user in waiting.pop().users:
            if user.op == "output" or (not user.users and user not in seen):
                return True
            if user not in seen:
                seen.add(user)
                waiting.append(user)
    return False
