"""Which of a graph's sizes are the batch, so that multiply-accumulates can be those of one sample."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import SymInt, Tensor, fx

from fxprune.graph.arguments import fixed_size
from fxprune.torch_internals import size_expression


@dataclass(frozen=True)
class Batch:
    """The batch of a graph: the free size of axis 0 of its inputs; where sizes are fixed, axis 0 that all inputs share.

    Attributes:
        inputs: the inputs that are tensors.
        captured: by symbol of a free size of an input, the size that it was captured with.
        sizes: the same for one sample: 1 for the batch.
        size: of the batch as it was captured; None where there is none.
        is_free: whether the batch is a symbol, not written in the graph.
    """

    inputs: tuple[fx.Node, ...] = ()
    captured: Mapping[Any, int] = field(default_factory=dict)
    sizes: Mapping[Any, int] = field(default_factory=dict)
    size: int | None = None
    is_free: bool = False

    @classmethod
    def of(cls, graph: fx.Graph, inputs: Iterable[fx.Node] | None = None) -> Batch:
        """The batch of a graph; `inputs` says which of its placeholders are no parameters, where some are."""
        places = graph.find_nodes(op="placeholder") if inputs is None else inputs
        tensors = tuple(node for node in places if isinstance(node.meta.get("val"), Tensor))
        captured: dict[Any, int] = {}
        for size in (size for node in tensors for size in node.meta["val"].shape if fixed_size(size) is None):
            if size_expression(size).is_Symbol:
                captured[size_expression(size)] = int(size.node.hint)
        firsts = [node.meta["val"].shape[0] for node in tensors if node.meta["val"].dim()]
        free = [size for size in firsts if fixed_size(size) is None]
        if free:
            length = int(free[0].node.hint)
            # inputs that never meet have a symbol each
            tied = [size_expression(size).free_symbols for size in free if int(size.node.hint) == length]
            return cls(tensors, captured, captured | dict.fromkeys(set().union(*tied), 1), length, True)
        fixed = {fixed_size(size) for size in firsts}
        shared = len(firsts) == len(tensors) and len(fixed) == 1
        return cls(tensors, captured, captured, fixed.pop() or None if shared else None)

    def shape(self, node: fx.Node) -> list[int]:
        """The shape of a node's tensor: for one sample where the batch is free, else as it is."""
        return [evaluated(size, self.sizes) for size in node.meta["val"].shape]

    def share(self, node: fx.Node) -> float:
        """One sample's part of what a node costs at `shape`; what depends on no input is needed once."""
        return 1 / self.size if self.size and not self.is_free and node in self._moving else 1.0

    def reaches(self, node: fx.Node) -> bool:
        """Whether a node reads or gives a tensor whose size depends on a free batch."""
        batch = {symbol for symbol, size in self.sizes.items() if self.captured.get(symbol) != size}
        return not batch.isdisjoint(self._symbols(node))

    def is_by_values(self, node: fx.Node) -> bool:
        """Whether a node reads or gives a tensor with a size that values decide, which no input has."""
        return not self._symbols(node) <= self.captured.keys()

    @staticmethod
    def _symbols(node: fx.Node) -> set[Any]:
        """The symbols in the sizes of tensors that a node reads or gives."""
        tensors = (each.meta.get("val") for each in (node, *node.all_input_nodes))
        sizes: list[Any] = [size for tensor in tensors if isinstance(tensor, Tensor) for size in tensor.shape]
        found = [size_expression(size).free_symbols for size in sizes if isinstance(size, SymInt)]
        return set().union(*found)

    @functools.cached_property
    def _moving(self) -> Collection[fx.Node]:
        """The nodes that depend on an input."""
        found = dict.fromkeys(self.inputs)
        for node in self.inputs[0].graph.nodes if self.inputs else ():
            if any(operand in found for operand in node.all_input_nodes):
                found[node] = None
        return found.keys()

    def __str__(self) -> str:
        """Such as "one sample of 3x224x224"; several inputs are named, and free axes, which have the captured size."""
        start = 0 if self.size is None else 1
        texts = ["x".join(map(str, self.shape(node)[start:])) or "one number" for node in self.inputs]
        if len(texts) > 1:
            texts = [f"{node.target} {text}" for node, text in zip(self.inputs, texts, strict=True)]
        free = [
            f"axis {axis} of {node.target} at {evaluated(size, self.captured)}"
            for node in self.inputs
            for axis, size in enumerate(node.meta["val"].shape)
            if axis >= start and fixed_size(size) is None
        ]
        what = "inputs" if self.size is None else "one sample"
        return f"{what} of {', '.join(texts) or 'no tensor'}" + (f", {', '.join(free)}" if free else "")


def evaluated(size: Any, values: Mapping[Any, int]) -> int:
    """A size as a number by those of its symbols; with a symbol that no input has, the size that was captured.

    What values decide, such as how many there are that are not zero, no capture knows: it counts as one.
    """
    fixed = fixed_size(size)
    if fixed is not None:
        return fixed
    numbers = {symbol: sympy.Integer(value) for symbol, value in values.items()}
    result = size_expression(size).xreplace(numbers)
    if result.is_number:
        return int(result)
    hint = size.node.hint
    return int(result.xreplace(dict.fromkeys(result.free_symbols, sympy.Integer(1))) if hint is None else hint)
