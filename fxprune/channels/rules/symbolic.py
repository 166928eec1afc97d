"""Arithmetic on sizes, and assertions about them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxprune.channels.edits import SetArguments
from fxprune.channels.registry import OperatorCall, register
from fxprune.channels.walk import Result, Walk
from fxprune.torch_internals import symbolic_square_root

aten = torch.ops.aten


@register(
    aten.sym_size, aten.sym_numel, aten.sym_stride, aten.sym_storage_offset, aten.sym_constrain_range,
    aten.sym_constrain_range_for_size, aten._assert_scalar, aten._assert_async,
    torch.sym_max, torch.sym_min, torch.sym_int, torch.sym_float, torch.sym_not, torch.sym_sum, torch.sym_ite,
    symbolic_square_root,
    operator.mul, operator.add, operator.sub, operator.floordiv, operator.truediv, operator.mod, operator.neg,
    operator.pow, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.and_,
    operator.or_, operator.not_, operator.is_, operator.is_not, operator.contains, max, min, int, float,
)  # fmt: skip
@dataclass(frozen=True, eq=False)
class SizeArithmetic(OperatorCall):
    """A number, or nothing."""

    is_pointwise: ClassVar[bool] = True

    def relate(self, walk: Walk) -> None:
        return None


@register(aten._assert_tensor_metadata)
@dataclass(frozen=True, eq=False)
class MetadataAssertion(OperatorCall):
    """What it asserts of sizes and strides is no longer so; types and devices are."""

    size: Any
    stride: Any

    def relate(self, walk: Walk) -> None:
        if self.size is not None or self.stride is not None:
            walk.edits.append(SetArguments(self.node, {"size": None, "stride": None}))


@register(operator.getitem)
@dataclass(frozen=True, eq=False)
class Item(OperatorCall):
    """One of several results."""

    results: fx.Node
    index: int

    @classmethod
    def parse(cls, node: fx.Node) -> Item:
        results, index = node.args
        assert isinstance(results, fx.Node)
        return cls(node, results, index)  # type: ignore[arg-type]

    def relate(self, walk: Walk) -> Result:
        items = walk.env[self.results]
        if not isinstance(items, list):
            return None
        walk.shared_storage(self.node, self.results)
        if self.results in walk.means_of_parts and not walk.is_rewritten(self.results):
            walk.means[self.node] = walk.means_of_parts[self.results][self.index]
        return items[self.index]
