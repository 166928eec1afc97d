"""Long graphs, which take seconds to capture, from short ones."""

from __future__ import annotations

from torch import fx
from torch._ops import OpOverload


def lengthen(graph: fx.Graph, target: OpOverload, times: int) -> str:
    """Apply the one call of `target` so many times in a row, in place of once.

    Returns:
        The name of the last of these calls.
    """
    (first,) = graph.find_nodes(op="call_function", target=target)
    readers, last = list(first.users), first
    for _ in range(times - 1):
        with graph.inserting_after(last):
            following = graph.call_function(target, (last, *first.args[1:]))
        following.meta = dict(first.meta)
        last = following
    for reader in readers:
        reader.replace_input_with(first, last)
    return last.name
