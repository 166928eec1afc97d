"""Operators that act on every element by itself, and copies; their constants are computed by running them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from fxprune.channels.axes import Axis, reduced_shape
from fxprune.channels.evaluation import run
from fxprune.channels.means import has_space
from fxprune.channels.registry import REGISTRY, OperatorCall, register
from fxprune.channels.values import Known, Value, settled, widened
from fxprune.channels.walk import DRAWS, Result, Walk

aten = torch.ops.aten


@register(
    aten.hardswish, aten.leaky_relu, aten.log_sigmoid, aten.bitwise_not, aten.nan_to_num,
    aten.__and__, aten.__or__, aten.__xor__,
    aten.max.other, aten.min.other, aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf,
)  # fmt: skip
@dataclass(frozen=True, eq=False)
class Pointwise(OperatorCall):
    """Elementwise under broadcasting; also the rule of every operator that torch tags as pointwise."""

    is_pointwise: ClassVar[bool] = True

    def relate(self, walk: Walk) -> Result:
        if walk.draws(self.node):
            return walk.refuse(self.node, DRAWS)
        operands = [node for node in self.node.all_input_nodes if isinstance(walk.env.get(node), Value)]
        axes, laid = walk.broadcast(self.node, [walk.value(node) for node in operands])
        if not walk.facts or len(operands) < len(self.node.all_input_nodes):
            return Value(axes)
        named = dict(zip(operands, laid, strict=True))
        result = self._constants(axes, named)
        if walk.means.keys() & named.keys():
            self._note_means(walk, result, named)
        return self._with_maps(walk, result, named) if walk.maps.keys() & named.keys() else result

    def _with_maps(self, walk: Walk, result: Value, operands: Mapping[fx.Node, Value]) -> Value:
        """The result with what is known by position: where all operands are constants, of positions or everywhere."""
        maps = {node: walk.maps[node] for node in operands if node in walk.maps}
        found = next(iter(maps.values()))
        shape, tags = reduced_shape(result.axes), self.node.target.tags  # type: ignore[union-attr]
        if any(each.source is not found.source for each in maps.values()) or not found.fits(shape):
            return result
        where, some, values = _TRUE, ~_TRUE, {}
        for node, value in operands.items():
            known = _TRUE.logical_not() if value.facts is None else value.facts.inner
            values[node] = _reduced(value.facts)
            if node in maps:
                if not maps[node].fits(reduced_shape(value.axes)):
                    return result
                own, by_position = maps[node].laid(len(shape))
                values[node] = torch.where(own, by_position, values[node])
                known, some = known | own, some | own
            where = where & known
        computed = None if torch.Tag.nondeterministic_seeded in tags else run(self.node, values)
        if computed is None or not computed.is_floating_point():
            return result
        return walk.note_maps(self.node, result, found, (where & some).expand(shape), computed)

    def _note_means(self, walk: Walk, result: Value, operands: Mapping[fx.Node, Value]) -> None:
        """The means over space of sums, and of products with what is the same at all positions."""
        target, inner, values = self.node.target, dict[fx.Node, Tensor](), dict[fx.Node, Tensor]()
        means = {node: walk.means[node] for node in operands if node in walk.means}
        first = next(iter(means))
        once = len(means) == 1 and self.node.args.count(first) == 1
        alike = target in _SUMS or (target in _PRODUCTS and once and self._is_factor(first))
        if not alike or not has_space(result.axes):
            return
        for node, value in operands.items():
            known = ~_TRUE if value.facts is None else value.facts.inner
            inner[node], values[node] = known, _reduced(value.facts)
            if node in means:
                if not means[node].fits(result.axes):
                    return
                inner[node] = known | means[node].where
                values[node] = torch.where(known, values[node], means[node].value)
        computed = run(self.node, values)
        if computed is not None and computed.is_floating_point():
            where = functools.reduce(operator.and_, inner.values())
            walk.note_means(self.node, result, where, computed)

    def _constants(self, axes: tuple[Axis, ...], operands: Mapping[fx.Node, Value]) -> Value:
        """Known where all operands are; a product also where one is known to be zero, a quotient where the first is."""
        facts = [value.facts for value in operands.values()]
        product = self.node.target in _PRODUCTS
        where = zero = torch.zeros((), dtype=torch.bool)
        if all(known is not None for known in facts):
            inner = [known.inner for known in facts if known is not None]
            where = functools.reduce(operator.and_, inner, torch.ones((), dtype=torch.bool))
        elif not product:
            return Value(axes)
        if product:
            factors = [known for node, known in zip(operands, facts, strict=True) if self._is_factor(node)]
            zeros = [known.inner & (known.value == 0) for known in factors if known is not None]
            zero = functools.reduce(operator.or_, zeros, zero)
            where = where | zero
        if torch.Tag.nondeterministic_seeded in self.node.target.tags or not where.any():  # type: ignore[union-attr]
            return Value(axes)
        value = run(self.node, {node: _reduced(operand.facts) for node, operand in operands.items()})
        if value is None:
            return Value(axes)
        return settled(axes, where, torch.where(where & ~zero, value, 0) if product else value)

    def _is_factor(self, operand: fx.Node) -> bool:
        """Whether the result of a product is zero where an operand is: what is divided by is none."""
        return self.node.target not in _QUOTIENTS or operand is not self.node.args[1]


_QUOTIENTS = (aten.div.Tensor, aten.div_.Tensor)
_SUMS = (aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor)
_PRODUCTS = (aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar, aten.mul_.Scalar, *_QUOTIENTS)

_TRUE = torch.ones((), dtype=torch.bool, device="cpu")

REGISTRY.set_pointwise(Pointwise)


@register(aten.copy)
@dataclass(frozen=True, eq=False)
class CopyInto(Pointwise):
    """The values of one operand in the shape of another, which a constant of another shape cannot replace."""

    is_pointwise: ClassVar[bool] = False


def _reduced(facts: Known | None) -> Tensor:
    return torch.zeros(()) if facts is None else widened(facts.value)


@register(
    aten.clone, aten.contiguous, aten.detach, aten.alias, aten.lift_fresh_copy, aten.lift_fresh, aten.to,
    aten._to_copy, aten.type_as, aten.positive,
)  # fmt: skip
@dataclass(frozen=True, eq=False)
class Copy(OperatorCall):
    """The same values in other memory or of another type."""

    data: fx.Node

    def relate(self, walk: Walk) -> Value:
        value = walk.viewed(self.node, self.data)
        dtype = self.node.meta["val"].dtype
        facts = value.facts
        if dtype == self.data.meta["val"].dtype:
            walk.pass_maps(self.data, self.node)
        elif facts is not None:
            return replace(value, facts=replace(facts, value=facts.value.to(dtype)), source=None)
        same_memory = self.node.target in _SAME_MEMORY
        return value if same_memory else value.without_source()


# in-place `detach_` too
_SAME_MEMORY = (aten.detach.default, aten.detach_.default, aten.alias.default, aten.contiguous.default)


@register(aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.feature_alpha_dropout)
@dataclass(frozen=True, eq=False)
class Dropout(OperatorCall):
    """In eval mode the identity, else what is known is lost; one that is on in eval mode, too, keeps its channels."""

    data: fx.Node
    p: float
    train: bool

    def relate(self, walk: Walk) -> Result:
        if walk.draws(self.node):
            return walk.refuse(self.node, DRAWS)
        value = walk.viewed(self.node, self.data)
        if self.train and self.p and not walk.training:
            return Value(value.axes)
        walk.pass_maps(self.data, self.node)
        return value.without_source()


@register(aten.prelu)
@dataclass(frozen=True, eq=False)
class Prelu(OperatorCall):
    """A slope for each channel, or one for all."""

    data: fx.Node
    weight: fx.Node
    modules: ClassVar = (nn.PReLU,)

    @classmethod
    def module_sizes(cls, module: nn.Module) -> dict[str, Any]:
        assert isinstance(module, nn.PReLU)
        return {"num_parameters": len(module.weight)}

    def relate(self, walk: Walk) -> Value:
        value, slope = walk.value(self.data), walk.value(self.weight)
        dim = 1 if value.rank > 1 else 0
        if not slope.axes[0].is_one:
            axis = walk.join(self.node, [value.axes[dim], slope.axes[0]])
            value, slope = value.relayout(dim, axis), slope.relayout(0, axis)
        if value.facts is None or slope.facts is None or not slope.facts.stored:
            return Value(value.axes)
        slopes = slope.facts.value.double().reshape([-1 if d == dim else 1 for d in range(value.rank)])
        known = value.facts.value
        return settled(value.axes, value.facts.inner, torch.where(known > 0, known, known * slopes))


@register(aten.glu)
@dataclass(frozen=True, eq=False)
class Glu(OperatorCall):
    """One half of an axis gates the other: index i stands and falls with index i of the other half."""

    data: fx.Node
    dim: int

    def relate(self, walk: Walk) -> Value:
        value = walk.value(self.data)
        dim = self.dim % value.rank
        value, ids = walk.merged(self.node, value, dim)
        if ids is None:
            axes = value.replaced_axis(dim, Axis.plain(walk.shape(self.node)[dim]))
            return self._gated(axes, value, value)
        half = len(ids) // 2
        walk.ids.unify(ids[:half], ids[half:])
        axes = value.replaced_axis(dim, walk.taken(self.node, ids[:half]))
        passed, gate = (
            value.moved(axes, functools.partial(torch.narrow, dim=dim, start=at, length=half)) for at in (0, half)
        )
        means = walk.means.get(self.data)
        if means is not None and dim == 1 and means.fits(value.axes) and has_space(axes) and gate.facts is not None:
            where, mean = (tensor.narrow(1, 0, half) for tensor in (means.where, means.value))
            where, mean = where & gate.facts.inner, mean * torch.sigmoid(gate.facts.value.double())
            walk.note_means(self.node, Value(axes), where, mean)
        return self._gated(axes, passed, gate)

    @staticmethod
    def _gated(axes: tuple[Axis, ...], passed: Value, gate: Value) -> Value:
        """One half times the sigmoid of the other: known where both are, and where zeros pass."""
        if passed.facts is None or gate.facts is None:
            return Value(axes)
        known = passed.facts.inner & (gate.facts.inner | (passed.facts.value == 0))
        product = passed.facts.value * torch.sigmoid(gate.facts.value)
        return settled(axes, known, torch.where(known, product, 0))
