"""Fold masks, weight norms, spectral norms and the user's parametrizations into plain parameters."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from fxprune.errors import FinalizeError
from fxprune.graph.editing import closure, erase_dead, evaluate, exists, locate, tensor_at
from fxprune.graph.reparametrizations import masked, remove_state, reparametrized, tagged
from fxprune.graph.traced import TracedModule

from .base import Pass

_RECURRENT = tuple(getattr(torch.ops.aten, kind).input for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu"))


@dataclass(frozen=True)
class FoldReparametrizations(Pass):
    """Store the value of every reparametrized parameter under its original name and take its expression away.

    The value is the one eval mode computes, to the bit. Cases: (1) a mask whose parameter nobody else holds: the
    same Parameter object stays, as `torch.nn.utils.prune.remove` does it; (2) a tied parameter, a norm or a
    parametrization: a new Parameter, so the other uses keep their values; (3) a masked parameter that no graph
    reads: the product is stored. What a parameter is computed from (a mask under a norm) is folded with it.

    Args:
        parameters: qualified names; None folds all.

    Example:
        >>> FoldReparametrizations()(traced).modified
        True
    """

    parameters: tuple[str, ...] | None = None
    name: ClassVar[str] = "fold-reparametrizations"

    def run(self, traced: TracedModule) -> bool:
        order = [graph for mode, graph in sorted(traced.graphs.items())]  # eval before train
        names = list(dict.fromkeys(n.meta["fxprune"]["parameter"] for graph in order for n in tagged(graph)))
        names += [n for n in masked(traced) if n not in names]  # (3)
        if self.parameters is not None:
            wanted = [n for graph in order for name in self.parameters for n in tagged(graph, name)]
            inner = {n.meta["fxprune"]["parameter"] for node in wanted for n in closure(node) if "fxprune" in n.meta}
            names = [n for n in names if n in self.parameters or n in inner]
        places: dict[str, list[fx.Node]] = {name: [] for name in names}
        for node in (node for graph in order for node in tagged(graph)):
            places.get(node.meta["fxprune"]["parameter"], []).append(node)
        holders = Counter(id(p) for module in traced.modules() for p in module._parameters.values())
        for name, nodes in places.items():
            self._fold(traced, name, nodes, holders)
        for graph in order:
            erase_dead(graph, lambda target: not exists(traced, target))
        return bool(names)

    def ensures(self, traced: TracedModule) -> None:
        left = [n for n in reparametrized(traced) if self.parameters is None or n in self.parameters]
        if left:
            raise FinalizeError(
                f"{', '.join(map(repr, left))}: the graph does not show which expression computes it, so it cannot be "
                "folded. Trace the eager model itself, or remove the parametrization before tracing."
            )

    def _fold(self, traced: TracedModule, name: str, nodes: list[fx.Node], holders: Counter[int]) -> None:
        owner, attribute = locate(traced, name)
        if nodes:
            same_graph = [node for node in nodes if node.graph is nodes[0].graph]
            values = [evaluate(traced, node) for node in same_graph]
            if not all(_same(values[0], value) for value in values[1:]):
                raise FinalizeError(
                    f"{name!r} has {len(values)} values in one forward, so no single parameter can stand for it."
                )
            value = values[0]
            sources = [tensor_at(traced, str(n.target)) for n in closure(nodes[0]) if n.op == "get_attr"]
        else:
            sources = [owner._parameters[f"{attribute}_orig"], owner._buffers[f"{attribute}_mask"]]  # type: ignore[list-item]
            value = (sources[1] * sources[0]).detach()
        if any(value.data_ptr() == source.data_ptr() for source in sources):
            value = value.clone()
        trained = any(isinstance(s, nn.Parameter) and s.requires_grad for s in sources)
        original = owner._parameters.get(f"{attribute}_orig")
        keeps_object = f"{attribute}_mask" in owner._buffers and holders[id(original)] == 1
        remove_state(traced, name)
        if original is not None and keeps_object:  # (1)
            original.data = value
            owner._parameters[attribute] = original
        else:  # (2)
            owner._parameters[attribute] = nn.Parameter(value, requires_grad=trained)
        owner.restore_order()  # type: ignore[operator]
        for node in nodes:
            with node.graph.inserting_before(node):
                read = node.graph.get_attr(name)
                read.meta = {k: v for k, v in node.meta.items() if k != "fxprune"}
                if _depends_on_grad_flag(node):
                    read = node.graph.call_function(torch.ops.aten.clone.default, (read,))
                    read.meta = dict(read.args[0].meta)  # type: ignore[union-attr]
            node.replace_all_uses_with(read)
            del node.meta["fxprune"]


def _depends_on_grad_flag(weight: fx.Node) -> bool:
    """Whether the bits of a product depend on its weight's `requires_grad`.

    ATen folds a strided input of three or more axes into a matrix when the weight requires a gradient, in recurrent
    layers too. Without gradient mode a parameter and its views still do and an expression does not: a copy is one.
    """
    for user in weight.users:
        values = [node.meta.get("val") for node in user.all_input_nodes]
        folds = user.target in (torch.ops.aten.linear.default, torch.ops.aten.matmul.default) and any(
            isinstance(value, torch.Tensor) and value.dim() > 2 and not value.is_contiguous() for value in values
        )
        schema = getattr(user.target, "_schema", None)
        views = user.target is operator.getitem or (schema and any(r.alias_info for r in schema.returns))
        if folds or user.target in _RECURRENT or (views and _depends_on_grad_flag(user)):
            return True
    return False


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return bool(((left == right) | (left.isnan() & right.isnan())).all())
