"""Copies of parameters that a graph takes before it reads them, which folding leaves for the sake of the last bit."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from fxprune.graph.mutation import may_write
from fxprune.torch_internals import schema_of


def copied_parameters(graph: fx.Graph) -> list[fx.Node]:
    """The copies of parameters and buffers that are only read, and only by operators that return values of their own.

    Where an expression is folded whose users compute other bits with a parameter, a copy of it is what they read: see
    `fxprune.passes.FoldReparametrizations`.
    """
    clones = graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)
    return [node for node in clones if _is_of_parameter(node) and all(map(_only_reads, node.users))]


def read_directly(graph: fx.Graph, names: Collection[str] | None = None) -> bool:
    """Let what reads copies of parameters, all or those of some names, read the parameters; whether there were any."""
    found = [n for n in copied_parameters(graph) if names is None or str(n.all_input_nodes[0].target) in names]
    for node in found:
        node.replace_all_uses_with(node.all_input_nodes[0])
        graph.erase_node(node)
    return bool(found)


def _is_of_parameter(node: fx.Node) -> bool:
    return len(node.all_input_nodes) == 1 and node.all_input_nodes[0].op == "get_attr"


def _only_reads(node: fx.Node) -> bool:
    schema = schema_of(node.target)
    return schema is not None and not may_write(node) and all(result.alias_info is None for result in schema.returns)
