"""Fold masks, weight norms, spectral norms and the user's parametrizations into plain parameters."""

from __future__ import annotations

import contextlib
import operator
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from fxprune.errors import FinalizeError
from fxprune.graph.containers import restore_order
from fxprune.graph.editing import erase_dead
from fxprune.graph.error_sites import working_on
from fxprune.graph.expressions import closure, evaluate
from fxprune.graph.masks import ParameterView, masked, original_name, view
from fxprune.graph.metadata import parameter_of, tag_of, tagged, untag
from fxprune.graph.names import ModulePaths, exists, tensor_at
from fxprune.graph.on_demand import Latest, masked_on_demand
from fxprune.graph.reparametrizations import computed_names, remove_state, reparametrized
from fxprune.graph.traced import TracedModule
from fxprune.graph.values import under_mask
from fxprune.sharding import by_parts, is_managed, is_sharded, spread, whole

from .base import Pass

_RECURRENT = tuple(getattr(torch.ops.aten, kind).input for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu"))


@dataclass(frozen=True)
class FoldReparametrizations(Pass):
    """Store the value of every reparametrized parameter under its original name and take its expression away.

    The value is the one eval mode computes, to the bit. Cases: (1) a mask whose parameter nobody else holds: the
    same Parameter object stays, as `torch.nn.utils.prune.remove` does it; (2) a tied parameter, a norm or a
    parametrization: a new Parameter, so the other uses keep their values; (3) a masked parameter that no graph
    reads: the product is stored. What a parameter is computed from (a mask under a norm) is folded with it. (4) With
    `keep_masks`, a mask on what a norm or a parametrization computes stays: the parameter is then one that a mask
    alone changes; other masks are left as they are. (5) With `anew`, a new Parameter in case (1), too. (6) With
    `on_demand`, what masks alone change is computed whenever it is read, so that it is never all held: for what is cut.

    Args:
        parameters: qualified names; None folds all.
        keep_masks: whether to fold what masks act on, in place of the masked values.
        anew: whether another module holds the parameters as well, which is to keep its values.
        on_demand: whether large products are not stored; the parameters are only to be read then, while what they are
            computed from stays as it is.

    Example:
        >>> FoldReparametrizations()(traced).modified
        True
    """

    parameters: tuple[str, ...] | None = None
    keep_masks: bool = False
    anew: bool = False
    on_demand: bool = False
    name: ClassVar[str] = "fold-reparametrizations"

    def run(self, traced: TracedModule) -> bool:
        order = list(traced.graphs.values())  # eval before train
        places = self._places(traced, order)
        holders = Counter(id(p) for module in traced.modules() for p in module._parameters.values())
        if self.anew:  # (5)
            holders = Counter({number: 2 * count for number, count in holders.items()})
        originals = [view(traced, name).original for name in places] if self.on_demand else []
        sizes = [original.nbytes for original in originals if original is not None]
        latest = Latest(max(sizes)) if sizes else None
        replaced = set()  # what is stored under these names now, other nodes do not mean
        for name, nodes in places.items():
            with working_on(nodes[0]) if nodes else contextlib.nullcontext():
                if nodes and tag_of(nodes[0]) is None:  # (4)
                    _fold_under_mask(traced, name, nodes)
                    replaced.add(original_name(name))
                else:
                    _fold(traced, name, nodes, holders, latest)
        for graph in order:
            erase_dead(graph, lambda target: target in replaced or not exists(traced, target))
        return bool(places)

    def _places(self, traced: TracedModule, graphs: list[fx.Graph]) -> dict[str, list[fx.Node]]:
        """By parameter to fold, the nodes that compute it."""
        places: dict[str, list[fx.Node]] = {}
        paths = ModulePaths(traced)  # a module may have several
        for node in (node for graph in graphs for node in tagged(graph)):
            places.setdefault(paths.canonical(_parameter(node)), []).append(node)
        for name in masked(traced):  # (3)
            places.setdefault(name, [])
        if self.parameters is not None:
            wanted = set(self.parameters)
            for name in self.parameters:
                inner = (n for node in places.get(name, ()) for n in closure(node) if tag_of(n))
                wanted |= {paths.canonical(_parameter(n)) for n in inner}
            places = {name: nodes for name, nodes in places.items() if name in wanted}
        return _under_masks(traced, places, paths) if self.keep_masks else places

    def written(self, traced: TracedModule) -> Collection[torch.Tensor]:  # (1)
        named = (view(traced, name).original for name in self.parameters or ())
        return [original for original in named if original is not None]

    def ensures(self, traced: TracedModule) -> None:
        there = computed_names(traced) if self.keep_masks else reparametrized(traced)
        left = [n for n in there if self.parameters is None or n in self.parameters]
        if left:
            raise FinalizeError(
                f"{', '.join(map(repr, left))}: the graph does not show which expression computes it, so it cannot be "
                "folded. Trace the eager model itself, or remove the parametrization before tracing."
            )


def _under_masks(
    traced: TracedModule, places: Mapping[str, list[fx.Node]], paths: ModulePaths
) -> dict[str, list[fx.Node]]:
    """By parameter that a norm computes, the nodes that do, before its mask, and all that those are computed from.

    What a mask alone changes is left out, unless a norm is computed from it. A masked original that is parametrized
    under its own name, such as `conv.weight_orig`, is there as that.
    """
    views = {name: view(traced, name) for name in places}
    inner = {name: [under_mask(views[name], node) for node in nodes] for name, nodes in places.items()}
    normed = {
        name: nodes
        for name, nodes in inner.items()
        if views[name].mask is None or (views[name].original_is_computed and not any(map(tag_of, nodes)))
    }
    below = {
        paths.canonical(_parameter(source))
        for nodes in normed.values()
        for node in nodes
        for source in closure(node)
        if tag_of(source) and source is not node
    }
    return {
        name: nodes if name in below else normed[name]
        for name, nodes in places.items()
        if name in below | normed.keys()
    }


def _parameter(node: fx.Node) -> str:
    name = parameter_of(node)
    assert name is not None, node
    return name


def _fold(
    traced: TracedModule, name: str, nodes: list[fx.Node], holders: Counter[int], latest: Latest | None
) -> None:  # fmt: skip
    found = view(traced, name)
    owner, attribute = found.owner, found.attribute
    product = None if latest is None else _product(found, nodes, latest)
    value, trained = _own_value(traced, found, nodes) if product is None else product
    original = None if found.mask is None else found.original
    remove_state(traced, name)
    if original is not None and holders[id(original)] == 1:  # (1)
        _write(original, value)
        owner._parameters[attribute] = original
    else:  # (2)
        holders[id(original)] -= 1
        owner._parameters[attribute] = nn.Parameter(value, requires_grad=trained)
    restore_order(owner)
    for node in nodes:
        _read_instead(node, name)


def _fold_under_mask(traced: TracedModule, name: str, nodes: list[fx.Node]) -> None:
    """Fold what a norm computes into the parameter that the mask stands on."""
    found = view(traced, name)
    value, trained = _own_value(traced, found, nodes)
    remove_state(traced, name, keep_mask=True)
    found.owner._parameters[original_name(found.attribute)] = nn.Parameter(value, requires_grad=trained)
    restore_order(found.owner)
    for node in nodes:
        _read_instead(node, original_name(name))


def _product(found: ParameterView, nodes: list[fx.Node], latest: Latest) -> tuple[torch.Tensor, bool] | None:
    """What `_own_value` gives, computed when it is read; None of what is more than a mask times a parameter."""  # (6)
    original, mask = found.original, found.mask
    if original is None or mask is None or not nodes or is_sharded(original) or is_sharded(mask):
        return None
    if any(node.target is not torch.ops.aten.mul.Tensor or len(closure(node)) != 3 for node in nodes):
        return None
    if mask.dtype != original.dtype or mask.device != original.device:
        return None
    return masked_on_demand(original.detach(), mask.detach, latest), original.requires_grad


def _own_value(traced: TracedModule, found: ParameterView, nodes: list[fx.Node]) -> tuple[torch.Tensor, bool]:
    """What a parameter folds to, in memory of its own, and whether it is trained."""
    value, sources = _value(traced, found, nodes)
    if any(not is_sharded(source) and value.data_ptr() == source.data_ptr() for source in sources):
        value = value.clone()
    if not is_managed(traced):  # which shards new parameters itself
        alike = (source for source in sources if is_sharded(source) and source.shape == value.shape)
        value = next((spread(value, source) for source in alike), value)
    return value, any(isinstance(s, nn.Parameter) and s.requires_grad for s in sources)


def _write(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Give a parameter other values, and of one that is sharded every process its part."""
    if is_sharded(parameter):
        with torch.no_grad():
            parameter.copy_(spread(value, parameter))
    else:
        parameter.data = value


def _value(traced: TracedModule, found: ParameterView, nodes: list[fx.Node]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What a reparametrized parameter folds to, and the tensors that it is computed from."""
    if not nodes:
        assert found.original is not None and found.mask is not None, found.name  # noqa: PT018
        return whole(by_parts(torch.mul, found.mask, found.original)), [found.original, found.mask]
    values = [evaluate(traced, node) for node in nodes if node.graph is nodes[0].graph]
    if not all(_same(values[0], value) for value in values[1:]):
        raise FinalizeError(
            f"{found.name!r} has {len(values)} values in one forward, so no single parameter can stand for it."
        )
    sources = [tensor_at(traced, str(n.target)) for n in closure(nodes[0]) if n.op == "get_attr"]
    return values[0], sources


def _read_instead(node: fx.Node, name: str) -> None:
    """Let the users of an expression read the parameter that it folded to."""
    with node.graph.inserting_before(node):
        read = node.graph.get_attr(name)
        read.meta = dict(node.meta)
        untag(read)
        if _depends_on_grad_flag(node):
            read = node.graph.call_function(torch.ops.aten.clone.default, (read,))
            read.meta = dict(read.args[0].meta)  # type: ignore[union-attr]
    node.replace_all_uses_with(read)
    untag(node)


def _depends_on_grad_flag(weight: fx.Node) -> bool:
    """Whether the bits of a product depend on its weight's `requires_grad`.

    ATen folds a strided input of three or more axes into a matrix when the weight requires a gradient, in recurrent
    layers too. Without gradient mode a parameter and its views still do and an expression does not: a copy is one.
    """
    for user in weight.users:
        is_weight = user.target is torch.ops.aten.linear.default and user.args[1] is weight
        folds = (is_weight or user.target is torch.ops.aten.matmul.default) and any(
            _may_be_strided(node) for node in user.all_input_nodes
        )
        schema = getattr(user.target, "_schema", None)
        views = user.target is operator.getitem or (schema and any(r.alias_info for r in schema.returns))
        if folds or user.target in _RECURRENT or (views and _depends_on_grad_flag(user)):
            return True
    return False


def _may_be_strided(node: fx.Node) -> bool:
    """Whether a value has three or more axes, and may not lie in their order.

    Shapes are traced as if recurrent layers returned what is contiguous, which by `batch_first` they do not.
    """
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() <= 2:
        return False
    if not value.is_contiguous():
        return True
    recurrent = {call for kind in _RECURRENT for call in node.graph.find_nodes(op="call_function", target=kind)}
    return bool(recurrent) and not recurrent.isdisjoint(closure(node))


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return bool(((left == right) | (left.isnan() & right.isnan())).all())
