"""The piece of a graph that touches some channels, from what writes them to what reads them, as a module of its own."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from fxprune.channels.groups import Grouping
from fxprune.channels.ids import Mask
from fxprune.channels.values import Stack, Value
from fxprune.errors import PruningError
from fxprune.graph.mutation import is_mutating
from fxprune.graph.names import tensor_at

Values = Mapping[fx.Node, Any]


@dataclass(frozen=True)
class Piece:
    """A part of a graph that can run alone.

    Attributes:
        module: runs it; its tensors are copies. inputs: what it works on, from a run of the whole.
        names: by the name of a parameter in the whole, that in the module.
        form: the same for pieces that take as long: operators, sizes and types.
    """

    module: fx.GraphModule
    inputs: tuple[Tensor, ...]
    names: Mapping[str, str]
    form: str


def cut_out(grouping: Grouping, values: Values, touched: Mask) -> Piece:
    """The piece of the eval graph that touches some classes of channels.

    All that lies between what writes channels and what reads them carries them, so they are inside of it, and what
    enters or leaves has none.

    Args:
        grouping: of the module. values: of its eval graph's nodes. touched: the classes.

    Raises:
        PruningError: it cannot run alone.
    """
    inside = _inside(grouping, touched)
    graph = grouping.plain.graphs["eval"]
    _check(inside, values)
    found, root = fx.Graph(), nn.Module()
    copies: dict[fx.Node, Any] = {}
    inputs: list[Tensor] = []
    names: dict[str, str] = {}
    needed = {operand for node in inside for operand in node.all_input_nodes if operand not in inside}
    outside = [node for node in graph.nodes if node in needed]
    for operand in (each for each in outside if each.op != "get_attr"):
        value = values[operand]
        if isinstance(value, Tensor):
            copies[operand] = found.placeholder(f"x{len(inputs)}")
            inputs.append(value.detach())
        else:
            copies[operand] = value
    held: dict[int, str] = {}  # one tensor may have several names
    for operand in (each for each in outside if each.op == "get_attr"):
        tensor = tensor_at(grouping.plain, str(operand.target))
        if id(tensor) not in held:
            held[id(tensor)] = f"t{len(held)}"
            _hold(root, held[id(tensor)], tensor.detach())
        names[str(operand.target)] = held[id(tensor)]
        copies[operand] = found.get_attr(held[id(tensor)])
    for node in inside:
        copies[node] = found.node_copy(node, copies.__getitem__)
        copies[node].meta.clear()
    ends = [n for n in inside if isinstance(values[n], Tensor) and any(user not in inside for user in n.users)]
    if not ends or not inputs:
        raise PruningError("nothing enters or leaves the layers that it touches")
    found.output(tuple(copies[node] for node in ends))
    return Piece(fx.GraphModule(root, found), tuple(inputs), names, _form(found, root, inputs))


def _form(graph: fx.Graph, root: nn.Module, inputs: Sequence[Tensor]) -> str:
    """Operators with their arguments, nodes by number, and the types and sizes of tensors."""
    numbers = {node: f"%{number}" for number, node in enumerate(graph.nodes)}
    lines = [
        f"{node.op} {node.target} {fx.map_arg((node.args, node.kwargs), lambda operand: numbers[operand])}"
        for node in graph.nodes
    ]
    tensors = [*root.named_parameters(), *root.named_buffers(), *((f"x{i}", each) for i, each in enumerate(inputs))]
    return "\n".join([*lines, *(f"{name} {tensor.dtype} {tuple(tensor.shape)}" for name, tensor in tensors)])


def _hold(root: nn.Module, name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point():
        root.register_parameter(name, nn.Parameter(tensor.clone(), requires_grad=False))
    else:
        root.register_buffer(name, tensor.clone())


def _inside(grouping: Grouping, touched: Mask) -> dict[fx.Node, None]:
    """The calls whose operands or results carry one of the classes, in the order of the graph."""
    walk = grouping.found.walks["eval"]
    carriers = {node for node, value in walk.env.items() if _carries(grouping, value, touched)}
    found: dict[fx.Node, None] = {}
    for node in (each for each in walk.graph.nodes if each.op == "call_function"):
        picks = node.target is operator.getitem and node.all_input_nodes[0] in found  # of several results
        if picks or node in carriers or any(each in carriers for each in node.all_input_nodes):
            found[node] = None
    return found


def _carries(grouping: Grouping, value: Any, touched: Mask) -> bool:
    if isinstance(value, list):
        return any(_carries(grouping, each, touched) for each in value)
    if not isinstance(value, Value):
        return False
    parts = value.parts if isinstance(value, Stack) else (value,)
    vectors = (factor.ids for part in parts for axis in part.axes for factor in axis if factor.ids is not None)
    return any(bool(touched[grouping.found.of(ids)].any()) for ids in vectors)


def _check(inside: Mapping[fx.Node, None], values: Values) -> None:
    for node in inside:
        if is_mutating(node):
            raise PruningError(f"{node.name} writes into what it is given")
        for operand in node.all_input_nodes:
            if operand not in inside and not isinstance(values[operand], Tensor | int | float):
                raise PruningError(f"{node.name} takes a {type(values[operand]).__name__} from elsewhere")


def zeroed(piece: Piece, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of some masks that are of parameters of a piece, by their names there."""
    return {piece.names[name]: mask for name, mask in masks.items() if name in piece.names}


def shape_of_cut(masks: Mapping[str, Tensor]) -> str:
    """By name and axis how many slices masks leave, the same for cuts that leave as much."""
    return str({name: [_left(mask, axis) for axis in range(mask.dim())] for name, mask in sorted(masks.items())})


def _left(mask: Tensor, axis: int) -> int:
    return int(mask.movedim(axis, 0).reshape(mask.shape[axis], -1).any(1).sum())
