"""Residual blocks: modules of a list that give what they are given where the weights that end their branches are zero.

A block is `x + f(x)`, or several of these in a row. Its branches are followed back from the sums: what a layer gives is
zero where its weight and its bias are, and stays so through what keeps zeros. What is found so is then run with zeros,
and is a block where it gives what came in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from fxprune.graph.editing import erase_dead
from fxprune.graph.interpretation import run
from fxprune.graph.metadata import module_calls, parameter_of, untag
from fxprune.graph.names import join, tensor_at
from fxprune.graph.sharing_copies import sharing_copy
from fxprune.graph.traced import TracedModule
from fxprune.torch_internals import schema_of

# the names of parameters, None where no parameters make a value zero
_Zeros: TypeAlias = "frozenset[str] | None"
_LAYERS = ("linear", "conv1d", "conv2d", "conv3d", "convolution", "addmm", "baddbmm", "mm", "bmm", "matmul")
_NORMS = ("batch_norm", "layer_norm", "group_norm", "rms_norm", "native_layer_norm", "instance_norm")
_SUMS = ("add", "add_", "sub", "sub_")
_PRODUCTS = ("mul", "mul_")
_PASSING = (
    "dropout", "dropout_", "clone", "contiguous", "to", "_to_copy", "type_as", "view", "reshape", "_unsafe_view",
    "flatten", "unflatten", "permute", "transpose", "squeeze", "unsqueeze", "cat", "slice", "select", "roll", "pad",
    "constant_pad_nd", "expand", "index", "mean", "alias", "detach", "movedim", "t", "split", "getitem",
)  # fmt: skip
_KEEPING = (*_PASSING, "relu", "relu_", "gelu", "silu", "silu_", "tanh", "neg", "div", "hardswish", "leaky_relu",
    "repeat", "sum", "masked_fill", "repeat_interleave")  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A module that gives what it is given where some parameters are zero.

    Attributes:
        path, number: of the list that it is in, and its place there. of: how many modules the list has.
        parameters: those that end its branches.
        given, taken: what finds the nodes that give its value, and what that is with these parameters zero.
    """

    path: str
    number: int
    of: int
    parameters: tuple[str, ...]
    given: str
    taken: str

    @property
    def name(self) -> str:
        """The path of the module."""
        return join(self.path, str(self.number))


def residual_blocks(plain: TracedModule) -> list[Block]:
    """The residual blocks of a module without reparametrizations, by their names; some may be within others.

    Those that are called once, of which nothing but what they give is read outside, and whose parameters nothing else
    reads.
    """
    graph = plain.graphs["eval"]
    found = [
        Block(path, number, of, tuple(sorted(own[2])), _key(own[0]), _key(own[1]))
        for (path, number, of), nodes in sorted(_nodes_by_entry(plain, graph).items())
        if (own := _Branches(graph, join(path, str(number)), nodes).block()) is not None
    ]
    return list(_confirmed(plain, found))


def without(traced: TracedModule, blocks: Collection[Block]) -> TracedModule:
    """A copy of a module, of its eval graph alone, in which blocks give what they are given; tensors are shared."""
    names = {block.name for block in blocks}
    copied = sharing_copy(traced)
    copied.keep_modes("eval")
    graph = copied.graphs["eval"]
    nodes = {_key(node): node for node in graph.nodes}
    order = {name: number for number, name in enumerate(nodes)}
    for block in sorted(blocks, key=lambda block: -order[block.given]):  # what one takes, another may give
        nodes[block.given].replace_all_uses_with(nodes[block.taken])
    for node in graph.nodes:
        parameter = parameter_of(node)
        if parameter is not None and any(parameter.startswith(f"{name}.") for name in names):
            untag(node)
    erase_dead(graph)
    copied.recompile()
    return copied


def _key(node: fx.Node) -> str:
    """What finds a node again in a copy of its graph, where inputs may have got other names."""
    return f"input {node.target}" if node.op == "placeholder" else node.name


def _nodes_by_entry(plain: TracedModule, graph: fx.Graph) -> dict[tuple[str, int, int], set[fx.Node]]:
    """By list, place in it and its length, the nodes of the modules in lists that are called once."""
    sizes = {path: len(module._modules) for path, module in plain.named_modules(remove_duplicate=False)}
    calls: dict[str, set[str]] = {}
    nodes: dict[tuple[str, int, int], set[fx.Node]] = {}
    for node in graph.nodes:
        for key, (path, _) in module_calls(node).items():
            around, _, last = str(path).rpartition(".")
            if last.isdecimal() and sizes.get(around, 0) > 1:
                calls.setdefault(str(path), set()).add(key)
                nodes.setdefault((around, int(last), sizes[around]), set()).add(node)
    return {entry: own for entry, own in nodes.items() if len(calls[join(entry[0], str(entry[1]))]) == 1}


class _Branches:
    """The branches of one module."""

    def __init__(self, graph: fx.Graph, name: str, nodes: set[fx.Node]) -> None:
        self._graph, self._name, self._nodes = graph, name, nodes
        self._zeros: dict[fx.Node, _Zeros] = {}

    def block(self) -> tuple[fx.Node, fx.Node, frozenset[str]] | None:
        """What it gives, what that is where its branches are zero, and the parameters that make them so."""
        given = [node for node in self._nodes if any(user not in self._nodes for user in node.users)]
        given = [node for node in given if node.op != "get_attr"]
        if len(given) != 1:
            return None
        found = self._stream(given[0])
        if found is None or not found[1]:
            return None
        taken, parameters = found
        own = {node for node in self._graph.find_nodes(op="get_attr") if str(node.target) in parameters}
        inside = all(user in self._nodes for node in own for user in node.users)
        return (given[0], taken, parameters) if inside else None

    def _stream(self, node: fx.Node) -> tuple[fx.Node, frozenset[str]] | None:
        """Where a value comes from outside once branches are zero, and the parameters that make them so."""
        if node not in self._nodes:
            return (node, frozenset()) if node.op != "get_attr" else None
        operator = _operator(node)
        if operator in _SUMS:
            operands = [each for each in node.args[:2] if isinstance(each, fx.Node)]
            if len(operands) != 2:
                return None
            ways = []
            for stream, branch in (operands, operands[::-1]):
                if operator.startswith("sub") and stream is not operands[0]:
                    continue
                zeros, source = self.zeros(branch), self._stream(stream)
                if zeros is not None and source is not None:
                    ways.append((source[0], source[1] | zeros))
            return min(ways, key=lambda way: len(way[1])) if ways else None
        if operator in _PASSING:
            parts = [self._stream(each) for each in node.all_input_nodes if _is_tensor(each)]
            sources = {part[0] for part in parts if part is not None}
            if len(sources) == 1 and all(part is not None for part in parts):
                return next(iter(sources)), frozenset().union(*(part[1] for part in parts if part is not None))
        return None

    def zeros(self, node: fx.Node) -> _Zeros:
        """The parameters of the module that make a value zero."""
        if node not in self._zeros:
            self._zeros[node] = None
            self._zeros[node] = self._zeros_of(node)
        return self._zeros[node]

    def _zeros_of(self, node: fx.Node) -> _Zeros:
        if node.op == "get_attr":
            target = str(node.target)
            return frozenset([target]) if target.startswith(f"{self._name}.") else None
        if node not in self._nodes or node.op != "call_function":
            return None
        operator, operands = _operator(node), node.args
        if operator in ("addmm", "baddbmm"):
            return _both(self._all(operands[:1]), self._any(operands[1:3]))
        if operator in _LAYERS:
            bias = operands[2:3] if operator not in ("mm", "bmm", "matmul") else ()
            return _both(self._any(operands[1::-1]), self._all(bias))
        if operator in _NORMS:
            arguments = _named(node)
            weight = arguments.get("weight")
            return self._all([weight, arguments.get("bias")]) if isinstance(weight, fx.Node) else None
        if operator in _SUMS:
            return self._all(operands[:2]) if all(isinstance(each, fx.Node) for each in operands[:2]) else None
        if operator in _PRODUCTS:
            return self._any(operands[:2])
        if operator == "cat":
            return self._all(operands[0]) if isinstance(operands[0], list | tuple) else None
        return self._any(operands[:1]) if operator in _KEEPING else None

    def _all(self, operands: Sequence[Any]) -> _Zeros:
        """Those that make all of several zero; what is None is not there."""
        found: _Zeros = frozenset()
        for each in operands:
            if each is not None:
                found = _both(found, self.zeros(each)) if isinstance(each, fx.Node) else None
        return found

    def _any(self, operands: Sequence[Any]) -> _Zeros:
        """Those that make one of several zero, the fewest."""
        found = [own for each in operands if isinstance(each, fx.Node) and (own := self.zeros(each)) is not None]
        return min(found, key=len) if found else None


def _both(one: _Zeros, other: _Zeros) -> _Zeros:
    return None if one is None or other is None else one | other


def _operator(node: fx.Node) -> str:
    schema = schema_of(node.target)
    if schema is not None:
        return schema.name.rpartition(":")[2] if schema.name.startswith("aten::") else ""
    return getattr(node.target, "__name__", "")


def _named(node: fx.Node) -> Mapping[str, Any]:
    schema = schema_of(node.target)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _is_tensor(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("val"), int | float | torch.SymInt)


def _confirmed(plain: TracedModule, found: Sequence[Block]) -> Iterator[Block]:
    """The blocks that give what they are given, in a run of the sample with all of their parameters zero."""
    masked = {name for block in found for name in block.parameters}
    watched = {name for block in found for name in (block.given, block.taken)}
    values: dict[str, Tensor] = {}

    def tensor(name: str) -> Any:
        value = tensor_at(plain, name)
        return torch.zeros_like(value) if name in masked else value

    def watch(node: fx.Node, value: Any) -> None:
        if _key(node) in watched and isinstance(value, Tensor):
            values[_key(node)] = value.clone()

    run(plain.graphs["eval"], tensor, pytree.tree_leaves((plain.example_args, plain.example_kwargs)), None, watch)
    for block in found:
        given, taken = values.get(block.given), values.get(block.taken)
        if given is not None and taken is not None and given.dtype == taken.dtype and torch.equal(given, taken):
            yield block
