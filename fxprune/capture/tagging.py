"""The values of a model's own reparametrizations, found in its captured graphs and tagged with their parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from fxprune.graph.metadata import module_calls, parameter_of, tag
from fxprune.graph.mutation import is_mutating
from fxprune.graph.names import join
from fxprune.graph.reparametrizations import Carried, carried, hook_state

_aten = torch.ops.aten


class _Formula(NamedTuple):
    """What a hook computes: its kind, and which part of its state each of the operator's first operands is."""

    kind: str
    operands: tuple[int, ...]


# the last of the operands is the state's first part, by which the hook is found
_FORMULAS: dict[Any, _Formula] = {
    _aten.mul.Tensor: _Formula("prune", (1, 0)),
    _aten._weight_norm.default: _Formula("weight_norm", (1, 0)),
    _aten.div.Tensor: _Formula("spectral_norm", (0,)),
}


def tag_results(graph: fx.Graph, model: nn.Module) -> None:
    """Mark the nodes that compute a tensor the model reparametrizes."""
    items = list(carried(model))
    _tag_parametrizations(graph, [item for item in items if item.kind == "parametrization"])
    _tag_hooks(graph, [item for item in items if item.kind != "parametrization"])  # hooks may read those


def _tag(node: fx.Node, item: Carried) -> None:
    tag(node, {"pass": item.kind.replace("_", "-"), "parameter": item.parameter})


# ---- parametrizations: what is computed inside the calls of their modules


def _tag_parametrizations(graph: fx.Graph, items: Iterable[Carried]) -> None:
    owners = {join(item.path, f"parametrizations.{item.tensor}"): item for item in items}
    if not owners:
        return
    inside = {node: set(_parametrizations_around(node, owners)) for node in graph.nodes}
    results: dict[str, list[fx.Node]] = {item.parameter: [] for item in owners.values()}
    is_computed: set[str] = set()
    for node, parameters in inside.items():
        for parameter in parameters if not is_mutating(node) else ():
            is_computed.add(parameter)
            if any(parameter not in inside[user] and not is_mutating(user) for user in node.users):
                results[parameter].append(node)
    # a parametrization that returns what it got leaves no node: the read of the original is the result
    for node in graph.find_nodes(op="get_attr"):
        path, _, stored = str(node.target).rpartition(".")
        item = owners.get(path)
        if item is None or item.parameter in is_computed or not stored.startswith("original"):
            continue
        if any(not is_mutating(user) for user in node.users):
            results[item.parameter].append(node)
    by_parameter = {item.parameter: item for item in owners.values()}
    for parameter, nodes in results.items():
        for node in nodes:
            _tag(node, by_parameter[parameter])


def _parametrizations_around(node: fx.Node, owners: dict[str, Carried]) -> Iterator[str]:
    """The parameters in whose parametrizations, or parts of these, a node was captured."""
    for path, _ in module_calls(node).values():
        while path:
            if path in owners:
                yield owners[path].parameter
            path = path.rpartition(".")[0]


# ---- hooks: known operators on what they store


def _tag_hooks(graph: fx.Graph, items: Iterable[Carried]) -> None:
    paths: dict[str, list[str]] = {}
    found: dict[tuple[str, str], Carried] = {}
    for item in items:
        paths.setdefault(item.parameter, []).append(item.path)
        found[item.kind, join(item.path, hook_state(item.kind, item.tensor)[0])] = item
    for node in graph.nodes if found else ():
        formula = _FORMULAS.get(node.target)
        if formula is None:
            continue
        names = [_stands_for(operand) for operand in node.args[: len(formula.operands)]]
        for hook in [found[formula.kind, name] for name in names[-1] if (formula.kind, name) in found]:
            state = hook_state(hook.kind, hook.tensor)
            wanted = [{join(path, state[part]) for path in paths[hook.parameter]} for part in formula.operands]
            if all(map(set.intersection, names, wanted)):
                if hook.kind == "prune":
                    _drop_conversion_of_mask(node)
                _tag(node, hook)


def _stands_for(operand: object) -> set[str]:
    """The names of what an operand is the value of, as it is or in another shape or dtype; none for an operation."""
    while isinstance(operand, fx.Node) and operand.target in (_aten.reshape.default, _aten.to.dtype):
        operand = operand.args[0]
    if not isinstance(operand, fx.Node):
        return set()
    return {name for name in (str(operand.target), parameter_of(operand)) if name is not None}


def _drop_conversion_of_mask(product: fx.Node) -> None:
    """Read the mask itself where converting it changes nothing now: it then follows later changes of dtype."""
    mask, original = product.args
    assert isinstance(mask, fx.Node)
    if mask.target is _aten.to.dtype:
        source = mask.args[0]
        assert isinstance(source, fx.Node)
        if mask.args[1] == source.meta["val"].dtype:
            product.args = (source, original)
