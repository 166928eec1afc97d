"""Expressions: what a node is computed from, and its value where that is parameters and buffers alone."""

from __future__ import annotations

import torch
from torch import fx, nn

from fxprune.errors import FinalizeError
from fxprune.graph.interpretation import run_nodes
from fxprune.graph.mutation import is_mutating
from fxprune.graph.names import tensor_at
from fxprune.graph.text import describe
from fxprune.sharding import is_sharded, whole


def closure(node: fx.Node) -> list[fx.Node]:
    """`node` and everything it is computed from, in graph order."""
    seen, pending = {node}, [node]
    while pending:
        fresh = [source for source in pending.pop().all_input_nodes if source not in seen]
        seen.update(fresh)
        pending += fresh
    return sorted(seen)


def evaluate(root: nn.Module, node: fx.Node) -> torch.Tensor:
    """The value of a node that depends on parameters and buffers alone; of sharded ones the whole value.

    Raises:
        FinalizeError: the value depends on an input, on random numbers, or needs a buffer to be written.
    """
    steps = closure(node)
    for step in steps:
        if not is_repeatable(step):
            raise FinalizeError(
                f"{describe(node)} was to be folded into a parameter, but it depends on {describe(step)}, which is "
                "an input, random, or writes a buffer. Such an expression has no constant value."
            )

    def read(target: str) -> torch.Tensor:
        stored = tensor_at(root, target)
        return whole(stored) if is_sharded(stored) else stored

    result = run_nodes(steps, read)[node]
    assert isinstance(result, torch.Tensor)
    return result


def is_repeatable(node: fx.Node) -> bool:
    """Whether a node has one value, given those that it reads."""
    if node.op == "get_attr":
        return True
    is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return node.op == "call_function" and not is_random and not is_mutating(node)


def depending_on_inputs(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that are computed from an input of the graph, and the inputs."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found
