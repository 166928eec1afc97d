"""Operators applied to what is known of their operands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.channels.axes import reduced_shape
from fxprune.channels.values import Known, Value
from fxprune.channels.walk import Result, Walk
from fxprune.graph.mutation import is_mutating
from fxprune.torch_internals import OpOverload


def run(node: fx.Node, values: Mapping[fx.Node, Tensor]) -> Tensor | None:
    """The operator applied to reduced values; None where it cannot take them, or does not give one tensor."""
    result = _called(node, values)
    return result if isinstance(result, Tensor) else None


def _called(node: fx.Node, values: Mapping[fx.Node, Tensor]) -> Any:
    target = node.target
    assert isinstance(target, OpOverload)
    if is_mutating(node):
        first = node.args[0]
        shape = torch.broadcast_shapes(*(value.shape for value in values.values()))
        values = {n: value.expand(shape).clone() if n is first else value for n, value in values.items()}
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    try:
        return target(*args, **kwargs)
    except (RuntimeError, TypeError):  # dtypes or shapes that the reduced form cannot have
        return None


def exactly(walk: Walk, node: fx.Node, result: Result) -> Result:
    """The results of an operator on parameters and buffers alone, which are one value each: as eager computes them.

    A result whose axes lost their channels on the way is left as its rule has it.
    """
    if walk.facts and isinstance(result, list) and _is_fixed(walk, node):
        values = _called(node, {operand: _stored(walk, operand) for operand in node.all_input_nodes})
        return result if values is None else [_settled(each, value) for each, value in zip(result, values, strict=True)]
    if not walk.facts or not isinstance(result, Value):
        return result
    if result.stored and result.facts is not None:
        return result if _is_whole(result) else replace(result, facts=replace(result.facts, stored=False))
    if not _is_fixed(walk, node):
        return result
    return _settled(result, run(node, {operand: _stored(walk, operand) for operand in node.all_input_nodes}))


def _settled(result: Value, value: Tensor | None) -> Value:
    """The result with its value, where this has its reduced shape."""
    if value is None or list(value.shape) != reduced_shape(result.axes):
        return result
    return replace(result, facts=Known.tensor(value.detach()))


def _is_whole(value: Value) -> bool:
    """Whether the reduced form is the whole value: a row that is looked up for every token is not."""
    return all(factor.ids is not None for axis in value.axes for factor in axis)


def _is_fixed(walk: Walk, node: fx.Node) -> bool:
    """Whether an operator has one result, and only reads."""
    operands = [walk.env.get(operand) for operand in node.all_input_nodes]
    if not operands or not all(isinstance(operand, Value) and operand.stored for operand in operands):
        return False
    return torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()) and not is_mutating(node)


def _stored(walk: Walk, operand: fx.Node) -> Tensor:
    facts = walk.value(operand).facts
    assert facts is not None
    return facts.value
