"""Which parameters of a graph are biases, and which are gains of batch norms: a score of channels tells them apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

_BATCH_NORM = ("batch_norm",)
_BIAS_THIRD = ("conv", "linear", "batch_norm", "instance_norm")  # have a bias or a shift as third argument
_BIAS_FIRST = (torch.ops.aten.addmm.default, torch.ops.aten.addmv.default, torch.ops.aten.baddbmm.default)


def bias_operands(graph: fx.Graph) -> set[str]:
    """The names of what is added to the outputs of layers and batch norms: parameters and, where it is one, a node."""
    first = (node for node in graph.nodes if node.target in _BIAS_FIRST)
    return _operands(_named(graph, _BIAS_THIRD), 2) | _operands(first, 0)


def gain_operands(graph: fx.Graph) -> set[str]:
    """The names of what batch norms multiply by."""
    return _operands(_named(graph, _BATCH_NORM), 1)


def _named(graph: fx.Graph, operators: tuple[str, ...]) -> list[fx.Node]:
    return [node for node in graph.nodes if any(name in str(node.target) for name in operators)]


def _operands(nodes: Iterable[fx.Node], position: int) -> set[str]:
    found: list[Any] = [node.args[position] for node in nodes if len(node.args) > position]
    return {str(operand.target) for operand in found if isinstance(operand, fx.Node)}
