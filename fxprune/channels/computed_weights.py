"""Weights of which forward computes each entry from all columns of its row: values in their place can be sliced."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxprune.graph.editing import erase_dead
from fxprune.graph.expressions import closure, is_repeatable
from fxprune.graph.interpretation import run_nodes
from fxprune.graph.names import locate, tensor_at, tensors_of
from fxprune.graph.sharing_copies import sharing_copy
from fxprune.graph.traced import TracedModule

aten = torch.ops.aten
_LAYERS = frozenset(
    {aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding,
     aten.conv2d.padding, aten.conv3d.padding, aten.convolution.default}
)  # fmt: skip


@dataclass(frozen=True)
class ComputedWeight:
    """A weight of layers that its graphs compute from a parameter of its shape, [rows, columns, ...].

    Attributes:
        name: of the parameter.
        nodes: by mode, what the layers read.
        value: what it is, the same in every mode.
    """

    name: str
    nodes: Mapping[str, Sequence[fx.Node]]
    value: Tensor


def mixed_weights(traced: TracedModule) -> list[ComputedWeight]:
    """The weights that are computed row by row, each entry of a row from all of its columns, as standardized ones are.

    What layers read can lose no column as it is computed: the others would change. Once the values stand in the
    place of the computation it can, exactly. Those alone that all graphs compute alike, from a parameter that nothing
    else reads.
    """
    if _has_no_values(traced):
        return []
    found = []
    for weight in _computed_alike(traced):
        nodes = [node for each in weight.nodes.values() for node in each]
        alike = all(torch.equal(weight.value, _value(traced, node, {})) for node in nodes[1:])
        if alike and _mixes_columns(traced, weight.name, nodes[0], weight.value):
            found.append(weight)
    return found


def weights_of_names(traced: TracedModule, names: Collection[str]) -> list[ComputedWeight]:
    """Those of `mixed_weights` of some names; where there are no values, as those of a module that has some."""
    known = _computed_alike(traced) if _has_no_values(traced) else mixed_weights(traced)
    return [weight for weight in known if weight.name in names]


def _has_no_values(traced: TracedModule) -> bool:
    return any(parameter.is_meta for parameter in traced.parameters())


def _computed_alike(traced: TracedModule) -> list[ComputedWeight]:
    """Weights that every graph computes from a parameter of their shape that nothing else reads."""
    by_mode = {mode: _computed(traced, graph) for mode, graph in traced.graphs.items()}
    found = []
    for name, first in by_mode.get("eval", {}).items():
        nodes = {mode: each[name] for mode, each in by_mode.items() if name in each}
        if len(nodes) == len(by_mode):
            found.append(ComputedWeight(name, nodes, _value(traced, first[0], {})))
    return found


def hold_values(traced: TracedModule, weights: Sequence[ComputedWeight]) -> None:
    """Put the values in the place of the parameters and their computation, in every graph."""
    for weight in weights:
        owner, attribute = locate(traced, weight.name)
        trained = owner._parameters[attribute].requires_grad  # type: ignore[union-attr]
        owner._parameters[attribute] = nn.Parameter(weight.value.clone(), trained)
        for node in (node for nodes in weight.nodes.values() for node in nodes):
            with node.graph.inserting_before(node):
                read = node.graph.get_attr(weight.name)
            read.meta = dict(node.meta)
            read.meta[HELD] = True
            node.replace_all_uses_with(read)
    for graph in traced.graphs.values():
        erase_dead(graph)
    traced.recompile()


def with_plain_weights(plain: TracedModule, names: Collection[str] | None = None) -> TracedModule:
    """A module, to be read only, with such weights as plain ones, as `finalize` leaves them; itself without any.

    All, or those of these names.
    """

    def chosen(module: TracedModule) -> list[ComputedWeight]:
        return mixed_weights(module) if names is None else weights_of_names(module, names)

    if not chosen(plain):
        return plain
    copied = sharing_copy(plain)
    hold_values(copied, chosen(copied))
    return copied


HELD = "fxprune_held"


def held_values(graph: fx.Graph) -> list[str]:
    """The parameters that hold what was computed from them, as an eval graph reads them."""
    return sorted({str(node.target) for node in graph.find_nodes(op="get_attr") if HELD in node.meta})


def _computed(traced: TracedModule, graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """By parameter the nodes that layers read in its place, where nothing else reads it."""
    tensors, found = tensors_of(traced), dict[str, list[fx.Node]]()
    steps: dict[str, set[fx.Node]] = {}
    for layer in graph.nodes:
        if layer.target not in _LAYERS or layer.args[1].op != "call_function":
            continue
        node = layer.args[1]
        computing = closure(node)
        if not all(is_repeatable(step) and not _keeps_statistics(step) for step in computing):
            continue
        shape = node.meta["val"].shape
        names = {
            str(step.target)
            for step in computing
            if step.op == "get_attr" and isinstance(tensors.get(str(step.target)), nn.Parameter)
            and tensors[str(step.target)].shape == shape
        }  # fmt: skip
        if len(names) == 1 and len(shape) > 1 and shape[1] > 1:
            name = names.pop()
            found.setdefault(name, [])
            if node not in found[name]:
                found[name].append(node)
            steps.setdefault(name, set()).update(computing)
    readers: dict[str, set[fx.Node]] = {name: set() for name in found}
    for read in graph.find_nodes(op="get_attr"):
        for name in found:
            if tensors.get(str(read.target)) is tensors[name]:
                readers[name].update(read.users)
    return {
        name: nodes
        for name, nodes in found.items()
        if readers[name] <= steps[name] and all(user.target in _LAYERS for node in nodes for user in node.users)
    }


def _keeps_statistics(step: fx.Node) -> bool:
    """Whether a node is a batch norm that writes running statistics."""
    return step.target is aten.batch_norm.default and step.args[3] is not None


def _value(traced: TracedModule, node: fx.Node, instead: Mapping[str, Tensor]) -> Tensor:
    def read(target: str) -> Tensor:
        return instead[target] if target in instead else tensor_at(traced, target)

    value = run_nodes(closure(node), read)[node]
    assert isinstance(value, Tensor)
    return value.detach()


def _mixes_columns(traced: TracedModule, name: str, node: fx.Node, value: Tensor) -> bool:
    """Whether other columns change with the first one, and other rows do not; a row of zeros stays one."""
    own = tensor_at(traced, name).detach()
    column, row = own.clone(), own.clone()
    column[:, 0] += 1 + own[:, 0].abs()
    row[0] = 0
    other_column, other_row = (_value(traced, node, {name: each}) for each in (column, row))
    by_rows = torch.equal(other_row[1:], value[1:]) and not other_row[0].any()
    return by_rows and not torch.equal(other_column[:, 1:], value[:, 1:])
