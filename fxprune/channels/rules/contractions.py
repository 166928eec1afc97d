"""The operators that are products of matrices, in all their spellings; each is a contraction by labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, fx, nn

from fxprune.channels.arguments import bound
from fxprune.channels.axes import Axis, reduced_shape, sizes_of
from fxprune.channels.ranges import Weights, note_layer
from fxprune.channels.readers import Bias
from fxprune.channels.registry import Cost, OperatorCall, Traffic, register
from fxprune.channels.rules.labels import Equation, Labels
from fxprune.channels.rules.products import Added, contract, summed_alone
from fxprune.channels.values import Value, beside
from fxprune.channels.walk import Result, Walk

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Contraction(OperatorCall):
    """A product of two operands, summed over what they share, plus a bias; the normal form of every spelling.

    Attributes:
        labels: None for what is no product of two operands.
        bias_operand: what is added, and the argument that it is.
    """

    left: fx.Node
    right: fx.Node
    labels: Labels | None
    bias_operand: fx.Node | None = None
    bias_argument: str | None = None

    @property
    def shift(self) -> fx.Node | None:
        return self.bias_operand

    def relate(self, walk: Walk) -> Result:
        if self.labels is None:
            return walk.refuse(self.node, "no product of two operands")
        value = None if self.bias_operand is None else walk.value(self.bias_operand)
        added = Added(value, Bias(self.bias_operand, self.bias_argument), self._scale == 1, self._bias_counts_once)
        left, right = walk.value(self.left), self._averaged(walk, walk.value(self.left), walk.value(self.right))
        result = contract(walk, self.node, self.labels, left, right, added)
        matrix = self._matrix(walk) if self.left in walk.ranges or self.left in walk.means else None
        if isinstance(result, Value) and matrix is not None:
            rows, shift = matrix
            note_layer(walk, self.node, self.left, result, Weights(rows[None, ..., None], -1, shift))
            self._note_means(walk, left, result, rows, shift)
        return result

    def _averaged(self, walk: Walk, left: Value, right: Value) -> Value:
        """The right operand with what is known of its means, where weights that are all the same take them."""
        means, labels = walk.means.get(self.right), self.labels
        if means is None or not left.sums or left.facts is None or labels is None or len(labels.contracted) != 1:
            return right
        at = labels.right.index(labels.contracted)
        if not means.are_over(right.axes, [at]) or labels.left[-1] != labels.contracted:
            return right
        shape = [1] * right.rank  # weights are the same for what has the batch's axes
        for dim, label in enumerate(labels.left):
            if label in labels.batch:
                shape[labels.right.index(label)] = left.axes[dim].reduced
            elif left.axes[dim].reduced != 1:
                return right
        return beside(right, means.where & left.facts.inner.reshape(shape), means.value)

    def _matrix(self, walk: Walk) -> tuple[Tensor, Tensor | None] | None:
        """The stored matrix that the last axis meets, rows first, and the stored shift; None of other products."""
        labels, table = self.labels, walk.stored(self.right)
        if labels is None or table is None or table.dim() != 2 or not self._bias_counts_once:
            return None
        if len(labels.contracted) != 1 or labels.left[-1] not in labels.contracted:
            return None
        shift = None if self.bias_operand is None else walk.stored(self.bias_operand)
        if shift is None and self.bias_operand is not None:
            return None
        return table if labels.right[-1] in labels.contracted else table.T, shift

    def _note_means(self, walk: Walk, data: Value, result: Value, rows: Tensor, shift: Tensor | None) -> None:
        """The means over axes that the matrix leaves alone are sums of those that it reads."""
        means, shape = walk.means.get(self.left), reduced_shape(result.axes)
        if means is None or not means.are_over(data.axes, means.space) or means.last == data.rank - 1:
            return
        if data.rank != result.rank or math.prod(shape) != shape[-1] or shape[-1] != len(rows):
            return
        where, value = means.where, means.value
        if where.numel() != rows.shape[1] or (shift is not None and shift.numel() != len(rows)):
            return
        known = ~((rows != 0) & ~where.reshape(-1)).any(-1)
        total = (rows.double() * torch.where(where, value, 0).reshape(-1)).sum(-1)
        total = total if shift is None else total + shift.double().reshape(-1)
        walk.note_means(self.node, result, known.reshape(shape), total.reshape(shape), means.space)

    @property
    def _scale(self) -> Any:
        """What the product is multiplied with."""
        return self.node.kwargs.get("alpha", 1)

    @property
    def _bias_counts_once(self) -> bool:
        """Whether product and bias are added as they are (`addmm` can scale both)."""
        return all(value == 1 for name, value in self.node.kwargs.items() if name in ("alpha", "beta"))

    def costs(self, env: Mapping[fx.Node, Result]) -> Sequence[Cost]:
        """The product of the sizes of all labels."""
        labels = self.labels
        if labels is None or not labels.contracted:
            return ()
        sizes = dict(zip(labels.left, sizes_of(self.left), strict=True))
        macs = float(math.prod(sizes_of(self.node)) * math.prod(sizes[label] for label in labels.contracted))
        result, left = env.get(self.node), env.get(self.left)
        axes = [*(result.axes if isinstance(result, Value) else ())]
        if isinstance(left, Value):
            axes += [left.axes[labels.left.index(label)] for label in labels.contracted]
        return [Cost(macs, tuple(axes))]


@register(aten.linear)
@dataclass(frozen=True, eq=False)
class Linear(Contraction):
    """`input @ weight.T + bias`."""

    modules: ClassVar = (nn.Linear,)

    @classmethod
    def parse(cls, node: fx.Node) -> Self:
        given = bound(node)
        left, right = given["input"], given["weight"]
        labels = Labels.of_matmul(_rank(left), _rank(right), transposed=_rank(right) == 2)
        return cls(node, left, right, labels, given["bias"], "bias")

    @property
    def weight(self) -> fx.Node:
        return self.right

    def scaled(self, weight: Tensor, factors: Tensor) -> Tensor:
        """A weight of this call times one factor for each output."""
        return weight * factors.view(-1, 1)

    @property
    def traffic(self) -> Traffic:
        return Traffic(*(math.prod(sizes_of(operand)) for operand in (self.node, self.left, self.right)))

    @classmethod
    def module_sizes(cls, module: nn.Module) -> dict[str, Any]:
        rows, columns = module.weight.shape  # type: ignore[misc]
        return {"out_features": rows, "in_features": columns}


@register(aten.matmul, aten.mm, aten.bmm, aten.mv)
@dataclass(frozen=True, eq=False)
class MatrixProduct(Contraction):
    """A product of (batches of) matrices and vectors."""

    @classmethod
    def parse(cls, node: fx.Node) -> Self:
        left, right = _operands(node)
        return cls(node, left, right, Labels.of_matmul(_rank(left), _rank(right), transposed=False))


@register(aten.linalg_solve_triangular)
@dataclass(frozen=True, eq=False)
class TriangularSystem(Contraction):
    """A product of the inverse of a matrix, which is triangular with ones on the diagonal, and what is given.

    It is zero where what is given is, along the axes of no equation, whatever the matrix; a matrix of zeros beside the
    diagonal leaves all as it is. What is known of the matrix says nothing of its inverse.
    """

    has_ones: bool = False

    @classmethod
    def parse(cls, node: fx.Node) -> Self:
        given = bound(node)
        matrix, data, is_left = given["self"], given["B"], given["left"]
        left, right = (matrix, data) if is_left else (data, matrix)
        labels = Labels.of_matmul(_rank(left), _rank(right), transposed=False)
        return cls(node, left, right, labels, has_ones=given["unitriangular"])

    def relate(self, walk: Walk) -> Result:
        if self.labels is None or not self.has_ones:
            return walk.refuse(self.node, "no system with ones on the diagonal")
        given = bound(self.node)
        matrix, data = walk.value(given["self"]), walk.value(given["B"])
        why = "equations of one system"
        matrix = Value(walk.blur(self.node, matrix, [matrix.rank - 2, matrix.rank - 1], why).axes)
        data = walk.blur(self.node, data, [data.rank - 2 if given["left"] else data.rank - 1], why)
        operands = (matrix, data) if given["left"] else (data, matrix)
        return contract(walk, self.node, self.labels, *operands, Added())

    def costs(self, env: Mapping[fx.Node, Result]) -> Sequence[Cost]:
        """None: `torch.utils.flop_counter` counts none."""
        return ()


@register(aten.addmm, aten.baddbmm)
@dataclass(frozen=True, eq=False)
class AddedProduct(Contraction):
    """A product of matrices and something added to it."""

    @classmethod
    def parse(cls, node: fx.Node) -> Self:
        added, left, right = _operands(node, 3)
        labels = Labels.of_matmul(_rank(left), _rank(right), transposed=False)
        return cls(node, left, right, labels, added, "self")


@register(aten.inner)
@dataclass(frozen=True, eq=False)
class InnerProduct(Contraction):
    """A product over the last axes of both operands."""

    @classmethod
    def parse(cls, node: fx.Node) -> Self:
        left, right = _operands(node)
        ranks = _rank(left), _rank(right)
        return cls(node, left, right, Labels.of_inner(*ranks) if min(ranks) else None)


@register(aten.tensordot)
@dataclass(frozen=True, eq=False)
class TensorProduct(Contraction):
    """A product over given axes of both operands."""

    @classmethod
    def parse(cls, node: fx.Node) -> Self:
        given = bound(node)
        left, right = given["self"], given["other"]
        labels = Labels.of_tensordot([_rank(left), _rank(right)], given["dims_self"], given["dims_other"])
        return cls(node, left, right, labels)


@register(aten.bilinear)
@dataclass(frozen=True, eq=False)
class Bilinear(OperatorCall):
    """Each output is a form of both operands, whose matrices are the weight: contracted with one, then the other."""

    input1: fx.Node
    input2: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    modules: ClassVar = (nn.Bilinear,)

    @property
    def shift(self) -> fx.Node | None:
        return self.bias

    def relate(self, walk: Walk) -> Value:
        rank = _rank(self.input1)
        first, second = Labels.of_bilinear(rank)
        between = contract(walk, self.node, first, walk.value(self.input1), walk.value(self.weight), Added(folds=False))
        bias = None if self.bias is None else walk.value(self.bias)
        added = Added(bias, Bias(self.bias, "bias"), folds=False)
        return contract(walk, self.node, second, between, walk.value(self.input2), added)

    @classmethod
    def module_sizes(cls, module: nn.Module) -> dict[str, Any]:
        rows, first, second = module.weight.shape  # type: ignore[misc]
        return {"out_features": rows, "in1_features": first, "in2_features": second}


@register(aten.einsum)
@dataclass(frozen=True, eq=False)
class Einsum(Contraction):
    """An equation of any number of operands, contracted one after the other; one with a diagonal is refused.

    Attributes:
        operands, equation: its parts, None for an equation with a diagonal.
    """

    operands: tuple[fx.Node, ...] = ()
    equation: Equation | None = None

    @classmethod
    def parse(cls, node: fx.Node) -> Self:
        written, operands = node.args[:2]
        assert isinstance(operands, list | tuple)
        nodes = tuple(operand for operand in operands if isinstance(operand, fx.Node))
        equation = Equation.parse(str(written), [_rank(operand) for operand in nodes])
        labels = equation.in_pairs()[0] if equation is not None and len(nodes) == 2 else None
        return cls(node, nodes[0], nodes[-1], labels, operands=nodes, equation=equation)

    def relate(self, walk: Walk) -> Result:
        if self.equation is None:
            return walk.refuse(self.node, "an equation with a diagonal")
        value, own = walk.value(self.operands[0]), self.equation.operands[0]
        pairs = self.equation.in_pairs()
        for labels, operand in zip(pairs, self.operands[1:], strict=True):
            # nothing can be added to what comes out in between
            added = Added(folds=labels is pairs[-1])
            value, own = contract(walk, self.node, labels, value, walk.value(operand), added), labels.out
        value, own = summed_alone(walk, self.node, value, own, self.equation.out)
        order = [own.index(label) for label in self.equation.out]
        if order == list(range(len(order))):
            return value if pairs else value.without_source()
        return value.moved([value.axes[dim] for dim in order], lambda tensor: tensor.permute(order))

    def costs(self, env: Mapping[fx.Node, Result]) -> Sequence[Cost]:
        """The products of the sizes of all labels of each contraction, one after the other."""
        if self.equation is None or len(self.operands) == 2:
            return super().costs(env)
        sizes: dict[str, int] = {}
        axes: dict[str, Axis] = {}
        for operand, labels in zip(self.operands, self.equation.operands, strict=True):
            for dim, size in enumerate(sizes_of(operand)):
                sizes[labels[dim]] = max(size, sizes.get(labels[dim], 1))  # of size one: broadcast
            value = env.get(operand)
            if isinstance(value, Value):
                axes |= {label: axis for label, axis in zip(labels, value.axes, strict=True) if label not in axes}
        return [
            Cost(math.prod(map(sizes.__getitem__, found)), tuple(axes[label] for label in found if label in axes))
            for found in (pair.out + pair.contracted for pair in self.equation.in_pairs() if pair.contracted)
        ]


def _operands(node: fx.Node, count: int = 2) -> list[fx.Node]:
    """The first arguments of a call, which are tensors."""
    return [operand for operand in node.args[:count] if isinstance(operand, fx.Node)]


def _rank(node: fx.Node) -> int:
    return len(node.meta["val"].shape)
