"""A flat graph as a program that torch's exporter takes, without capturing it again.

`torch.onnx.export` captures a module, and then captures the program once more in smaller operators: two thirds of its
time. A traced module has been captured, and most of its operators are translated as they are. The others are captured
one at a time, and what is done for one layer does for its repetitions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

from fxprune.borrowing import Borrowed, addressed
from fxprune.capture.lifting import lift_tensors, lifted_program
from fxprune.errors import ExportError
from fxprune.graph.calls import Call
from fxprune.graph.codegen import CodeGen
from fxprune.graph.mutation import may_write
from fxprune.graph.names import tensor_at
from fxprune.graph.spread_modules import with_stand_ins
from fxprune.torch_internals import (
    FakeTensor,
    FakeTensorMode,
    OpOverload,
    any_recurrent_length,
    fake_cpu_tensor,
    fake_like,
    guards_ignored,
    is_composite,
    no_new_guards,
    pytree_info,
    size_expression,
)

_Table = Mapping[Any, Callable[..., Any]]


class AtHandProgram(ExportedProgram):
    """A program that takes smaller operators one node at a time."""

    def run_decompositions(self, decomp_table: Any = None, decompose_custom_triton_ops: bool = False) -> AtHandProgram:
        """Itself, in place; torch's own captures the whole program again."""
        with no_new_guards(_mode(self.graph)):
            _Smaller(self.graph, decomp_table or {}).run()
        return self


def program_at_hand(module: fx.GraphModule) -> AtHandProgram:
    """A flat module as a program; nothing of it is run.

    Raises:
        ExportError: it has to be captured again: it writes into tensors, has branches, or records values of several
            captures.
    """
    graph = fx.Graph()
    output = graph.graph_copy(module.graph, {})
    taken = {node.name for node in graph.nodes}
    for node in graph.find_nodes(op="placeholder"):
        if node.target not in taken:  # fx renames those that have the name of a builtin, as `input`
            node.name = str(node.target)
    graph.output(output)
    graph.set_codegen(CodeGen(pytree_info(module.graph)))
    _check(module, graph)
    _erase_unread(graph)
    mode = _mode(graph)
    reads = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    tensors = {path: addressed(tensor_at(module, path).detach()) for path in reads}
    examples = {path: _fake(mode, tensor) for path, tensor in tensors.items()}
    paths = lift_tensors(graph, examples)
    _record(graph, mode)
    program = lifted_program(graph, nn.Module(), paths, tensors, mode, AtHandProgram)
    assert isinstance(program, AtHandProgram)
    return program


class CapturedProgram(ExportedProgram):
    """A program that was captured without the values of large tensors, and has them once it was taken apart."""

    lent: Mapping[str, Tensor]

    def run_decompositions(self, decomp_table: Any = None, decompose_custom_triton_ops: bool = False) -> Any:
        """One in smaller operators, which torch captures from this one, with all values."""
        found = super().run_decompositions(decomp_table, decompose_custom_triton_ops)
        for held in (found.state_dict, found.constants):
            held.update({name: addressed(value.detach()) for name, value in self.lent.items() if name in held})
        return found


def program_of_capture(module: fx.GraphModule, sample: Call, dynamic_shapes: Any) -> ExportedProgram:
    """A flat module captured once more; used up.

    torch's capture takes plain tensors, and reads none of those that operators read: what is borrowed stays there.

    Args:
        module: it. sample: what it is captured with. dynamic_shapes: as torch takes them.
    """
    lent = with_stand_ins(module)
    exported = torch.export.export(module, *sample, dynamic_shapes=dynamic_shapes, strict=False)
    if lent:
        exported.__class__ = CapturedProgram
        exported.lent = lent  # type: ignore[attr-defined]
    return exported


def _fake(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """An example of a tensor; of one that is borrowed no values come for it."""
    return fake_cpu_tensor(mode, tensor) if isinstance(tensor, Borrowed) else fake_like(mode, tensor)


def nothing_learned(program: AtHandProgram) -> AbstractContextManager[None]:
    """While it is translated, let the capture at hand, which others share, learn nothing of free sizes."""
    return guards_ignored(_mode(program.graph))


def _mode(graph: fx.Graph) -> FakeTensorMode:
    """The capture that the recorded values are of."""
    leaves = [leaf for node in graph.nodes for leaf in pytree.tree_leaves(node.meta.get("val"))]
    modes = {leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor)}
    if len(modes) != 1:
        raise ExportError(f"it records values of {len(modes)} captures")
    (mode,) = modes
    return mode


def _check(module: fx.GraphModule, graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.op == "get_attr" and not isinstance(tensor_at(module, str(node.target)), Tensor):
            raise ExportError(f"{node.target} is no tensor")
        if node.op == "placeholder" and node.users and not isinstance(node.meta.get("val"), FakeTensor):
            raise ExportError(f"{node.name} is no tensor")
        if may_write(node):
            raise ExportError(f"{node.target} writes")


def _erase_unread(graph: fx.Graph) -> None:
    """Nothing writes, so what is not read has no use; torch keeps operators that draw random numbers."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)


def _values(arguments: Any) -> Any:
    return pytree.tree_map_only(fx.Node, lambda node: node.meta["val"], arguments)


def _record(graph: fx.Graph, mode: FakeTensorMode) -> None:
    """Let every node record what it gives.

    Strides that were recorded are of the capture: other operators have taken the place of some, and axes are shorter.
    """
    with mode, torch.no_grad(), guards_ignored(mode), any_recurrent_length():
        for node in [node for node in graph.nodes if node.op == "call_function"]:
            args, kwargs = _values((node.args, dict(node.kwargs)))
            value, before = _run(node, args, kwargs), node.meta.get("val")
            expected = _symbols((args, kwargs) if before is None else before)
            is_free = not isinstance(value, Tensor | tuple | list) or expected <= _symbols(value)
            node.meta["val"] = value if is_free else _with_sizes_of(node, value, before)


def _run(node: fx.Node, args: Any, kwargs: Any) -> Any:
    try:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:  # torch's operators raise whatever they raise where sizes are free
        raise ExportError(f"{node.target} does not run on free sizes") from error


def _symbols(values: Any) -> set[Any]:
    """The symbols of the free sizes of tensors."""
    tensors = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
    shapes: list[Any] = [size for tensor in tensors for size in tensor.shape]
    sizes = [size for size in shapes if isinstance(size, torch.SymInt)]
    return {symbol for size in sizes for symbol in size_expression(size).free_symbols}


def _with_sizes_of(node: fx.Node, value: Any, before: Any) -> Tensor:
    """A result with the sizes that were recorded: some operators (constant_pad_nd) give those of the sample.

    Raises:
        ExportError: nothing of the same sizes was recorded.
    """
    is_alike = isinstance(value, Tensor) and isinstance(before, Tensor) and _is_contiguous(value)
    if is_alike and [_of_the_sample(size) for size in before.shape] == list(value.shape):
        return torch.empty(before.shape, dtype=value.dtype, device=value.device)
    raise ExportError(f"{node.target} fixes free sizes")


def _is_contiguous(value: Tensor) -> bool:
    """Whether a tensor is known to be, which of sizes that are values nobody knows."""
    try:
        return value.is_contiguous()
    except RuntimeError:
        return False


def _of_the_sample(size: Any) -> Any:
    return size.node.hint if isinstance(size, torch.SymInt) else size


# ---- smaller operators


@functools.cache
def _known_to_torch() -> frozenset[Any]:
    """What torch can take apart, among it composite operators that its exporter may ask to keep."""
    return frozenset(torch.export.default_decompositions())


@dataclass
class _Smaller:
    """Takes the operators of a table apart, those of each form once."""

    graph: fx.Graph
    table: _Table
    made: dict[Any, fx.GraphModule] = field(default_factory=dict)

    def run(self) -> None:
        """Replace them in the graph."""
        for node in list(self.graph.nodes):
            if node.op == "call_function" and isinstance(node.target, OpOverload) and self._is_large(node.target):
                self._replace(node)
        self.graph.lint()

    def _is_large(self, target: OpOverload) -> bool:
        return target in self.table or (is_composite(target) and target not in _known_to_torch())

    def _replace(self, node: fx.Node) -> None:
        leaves, structure = pytree.tree_flatten((node.args, dict(node.kwargs)))
        inputs = list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, fx.Node)))
        form = (node.target, str(structure), *(_form(leaf, inputs) for leaf in leaves))
        if form not in self.made:
            self.made[form] = self._capture(node, leaves, structure, inputs)
        parts = self.made[form].graph
        copies = dict(zip(parts.find_nodes(op="placeholder"), inputs, strict=True))
        with self.graph.inserting_before(node):
            result = self.graph.graph_copy(parts, copies)
        given = set(inputs)
        for part, copied in copies.items():
            if copied not in given:
                copied.meta = {**node.meta, "val": part.meta["val"]}
        if result in given and node.graph.output_node() in node.users:
            with self.graph.inserting_before(node):
                result = self.graph.call_function(torch.ops.aten.clone.default, (result,))
            result.meta = dict(node.meta)
        _read_parts(node, result)

    def _capture(self, node: fx.Node, leaves: list[Any], structure: Any, inputs: list[fx.Node]) -> fx.GraphModule:
        """The operator in smaller ones, over the nodes that it takes."""

        def call(*values: Any) -> Any:
            by_node = dict(zip(inputs, values, strict=True))
            args, kwargs = pytree.tree_unflatten(
                [by_node[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in leaves], structure
            )
            return node.target(*args, **kwargs)  # type: ignore[operator]

        values = [leaf.meta["val"] for leaf in inputs]
        with torch.no_grad():
            # composite operators write into their own results: what that is shows when they have been taken apart
            apart = make_fx(call, {}, tracing_mode="symbolic")(*values)
            made: fx.GraphModule = make_fx(torch.func.functionalize(apart), dict(self.table), tracing_mode="symbolic")(
                *values
            )
        for part in made.graph.nodes:
            if part.op == "get_attr" or may_write(part):
                raise ExportError(f"{node.target} holds a constant, or writes")
        return made


def _read_parts(node: fx.Node, result: Any) -> None:
    """Let what reads a node read `result`: a node, or one for each of several results."""
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
        node.graph.erase_node(node)
        if result.op == "call_function" and result not in node.all_input_nodes:
            result.name = node.name  # outputs and origins are found by it
        return
    for user in list(node.users):
        part = result[user.args[1]]
        user.replace_all_uses_with(part)
        node.graph.erase_node(user)
        part.name = user.name
    node.graph.erase_node(node)


def _form(leaf: Any, inputs: list[fx.Node]) -> Any:
    """What the decomposition of an operator can depend on, of one of its arguments."""
    if not isinstance(leaf, fx.Node):
        return type(leaf), repr(leaf)
    return inputs.index(leaf), *_sizes(leaf.meta["val"])


def _sizes(value: Any) -> Iterator[Any]:
    if isinstance(value, Tensor):
        yield value.dtype
        yield value.device
        for size in (*value.shape, None, *value.stride(), None, value.storage_offset()):
            yield size_expression(size) if isinstance(size, torch.SymInt) else size
    else:
        yield size_expression(value) if isinstance(value, torch.SymInt) else repr(value)
