"""In which order two networks run side by side, so that every reader is fitted before what reads it runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import fx

from fxprune.graph.mutation import is_mutating, written
from fxprune.prune.repair.finding import Stream
from fxprune.prune.repair.layers import Reader
from fxprune.torch_internals import schema_of

aten = torch.ops.aten

# moments of the readers that are fitted at once, in numbers of 8 bytes
_MOST_MOMENTS = 2**27
# they give their operand itself where they are off, which their schemas do not say
_MAY_ALIAS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)


@dataclass(frozen=True, eq=False)
class Wave:
    """What runs between two fits.

    Attributes:
        current: the nodes of the masked network, in order. reference: those of the reference.
        tried: nodes that run in both networks for the fits alone, with weights as they are, and again later: what lies
            between the calls of a reader that reads, further on, what it gave.
        readers: those that are fitted after it. corrected: their calls whose target includes what their stream is
            missing.
    """

    current: list[fx.Node]
    reference: list[fx.Node]
    tried: list[fx.Node]
    readers: list[Reader]
    corrected: list[fx.Node]

    def fits(self, streams: Mapping[fx.Node, Stream]) -> set[fx.Node]:
        """The nodes whose values the fits need, in both networks."""
        calls = [call for reader in self.readers for call in reader.calls]
        read = {each for call in calls for each in (call.data, call.state) if each is not None}
        return read | {streams[node].other for node in self.corrected}


@dataclass(frozen=True, eq=False)
class Layout:
    """What of a graph runs, and how.

    Attributes:
        moving: the nodes that depend on an input, and are needed, in order.
        fixed: the others that are needed, in order.
        differing: the nodes whose values can differ between the two networks.
        is_strict: whether operators write into what others read, so that the order must stay.
    """

    moving: list[fx.Node]
    fixed: list[fx.Node]
    differing: Set[fx.Node]
    is_strict: bool

    @classmethod
    def of(cls, graph: fx.Graph, ends: Collection[fx.Node], sources: Collection[fx.Node]) -> Layout:
        """The layout of what `ends` need; the networks differ at `sources` and in what depends on them."""
        needed, moving, differing = set(ends), dict[fx.Node, None](), set(sources)
        writers = [node for node in graph.nodes if is_mutating(node) and any(node <= end for end in ends)]
        is_strict = any(not all(_is_own(each) for each in written(node)) for node in writers)
        needed.update(writers if is_strict else ())
        for node in reversed(graph.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        for node in graph.nodes:
            sure = node.op in ("placeholder", "get_attr")
            reads_input = any(each in moving for each in node.all_input_nodes)
            may_change = is_strict and not sure and node not in sources  # by what writes into it
            if node.op == "placeholder" or reads_input or may_change:
                moving[node] = None
            if any(each in differing for each in node.all_input_nodes) or (is_strict and node in moving):
                differing.add(node)
        ordered = [node for node in graph.nodes if node in needed]
        fixed = [node for node in ordered if node not in moving]
        return cls([node for node in ordered if node in moving], fixed, differing, is_strict)


def _is_own(node: fx.Node) -> bool:
    """Whether nothing but its one user sees what is written into a node's value."""
    if len(node.users) != 1 or node.op == "placeholder":
        return node.op == "placeholder" and len(node.users) == 1
    if is_mutating(node):
        return all(_is_own(each) for each in written(node))
    schema = schema_of(node.target)
    if schema is None or node.target in _MAY_ALIAS:
        return node.op == "get_attr"
    return all(result.alias_info is None for result in schema.returns)


def plan(layout: Layout, readers: Sequence[Reader], streams: Mapping[fx.Node, Stream]) -> list[Wave]:
    """The waves, the last of which fits the last reader.

    A reader waits for the stream that its output is added to, unless nothing else is left to do. One that reads, by
    another call, what it gave is fitted to all of its calls with the weights that are there.
    """
    waiting = {call.node: reader for reader in readers for call in reader.calls}
    reads = {reader: {each for node in _nodes(reader) for each in node.all_input_nodes} for reader in readers}
    todo = [node for node in layout.moving if node.op != "placeholder"]
    done = {*layout.fixed, *(node for node in layout.moving if node.op == "placeholder")}
    ahead: set[fx.Node] = set()
    waves = []
    while waiting:
        current = _runnable(todo, done, waiting, layout.is_strict)
        done.update(current)
        todo = [node for node in todo if node not in done]
        ready = [each for each in dict.fromkeys(waiting.values()) if done.issuperset(reads[each])]
        ready = ready[:1] if layout.is_strict else ready
        free = [each for each in ready if all(streams[node].other in done for node in _nodes(each) if node in streams)]
        chosen = _affordable(free or ready[:1] or _first_alike(waiting, done))
        calls = [node for reader in chosen for node in _nodes(reader)]
        tried = [] if ready else _up_to(calls, todo)
        reference = [node for node in current if node in layout.differing and node not in ahead]
        if tried:  # runs several times, what lies before it once
            waves.append(Wave(current, reference, [], [], []))
            current, reference = [], []
        else:
            reference += calls
            ahead.update(calls)
        there = set() if tried else done & set(layout.differing)  # what streams miss changes with what is fitted
        corrected = [node for node in calls if node in streams and streams[node].other in there]
        waves.append(Wave(current, reference, tried, chosen, corrected))
        for node in calls:
            del waiting[node]
    return waves


def _nodes(reader: Reader) -> list[fx.Node]:
    return [call.node for call in reader.calls]


def _first_alike(waiting: Mapping[fx.Node, Reader], done: Collection[fx.Node]) -> list[Reader]:
    """The readers of the same inputs of which a first call can run."""
    first = next(waiting[node] for node in sorted(waiting) if all(each in done for each in node.all_input_nodes))
    return [reader for reader in dict.fromkeys(waiting.values()) if reader.key == first.key]


def _up_to(ends: Collection[fx.Node], todo: Sequence[fx.Node]) -> list[fx.Node]:
    """Of the nodes that did not run yet, those that `ends` need, and these."""
    needed = set(ends)
    for node in reversed(todo):
        if node in needed:
            needed.update(node.all_input_nodes)
    return [node for node in todo if node in needed]


def _runnable(
    todo: Sequence[fx.Node], done: Collection[fx.Node], waiting: Collection[fx.Node], is_strict: bool
) -> list[fx.Node]:
    """The nodes that can run before a reader that waits is fitted."""
    found: dict[fx.Node, None] = {}
    for node in todo:
        if node not in waiting and all(each in done or each in found for each in node.all_input_nodes):
            found[node] = None
        elif is_strict:
            break
    return [*found]


def _affordable(readers: Sequence[Reader]) -> list[Reader]:
    """As many of the readers, from the first on, as have moments that fit in memory."""
    chosen: list[Reader] = []
    keys, total = set(), 0
    for reader in readers:
        groups, outputs, columns = reader.sizes
        total += 0 if reader.key in keys else 2 * groups * columns**2
        total += 2 * groups * columns * outputs
        if chosen and total > _MOST_MOMENTS:
            break
        keys.add(reader.key)
        chosen.append(reader)
    return chosen
