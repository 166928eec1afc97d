"""Caches of keys and values: heads and channels of what a graph keeps for its next call go with those of its layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from fxprune.capture.cached_tensors import CachedTensor, cached_tensors
from fxprune.channels.axes import Axis
from fxprune.channels.edits import Kept
from fxprune.channels.ids import Ids, Vector
from fxprune.channels.values import Known, Value
from fxprune.channels.walk import Walk
from fxprune.graph.traced import TracedModule

aten = torch.ops.aten
# of [batch, heads, positions, channels] those that a layer's weights make
HEADS, CHANNELS = 1, 3
_PASSING = (aten.slice.Tensor, aten.narrow.default, aten.alias.default, aten.detach.default, aten.clone.default)
_WRITING = (aten.index_copy.default, aten.index_copy_.default)


@dataclass
class CachedHeads:
    """What the graphs of a module keep in caches, and what is known of it.

    A graph that takes a cache takes what it returned itself, at the start an empty one or one of zeros. So whatever it
    writes as zero, it will find as zero.

    Attributes:
        ids: by name those of the heads and of the channels, the same in every graph and in inputs and outputs.
        made: by name those of the outputs of a graph that takes none.
        zeros: by name which heads and channels are written as zero, [1, heads, 1, channels].
    """

    ids: dict[str, dict[int, Vector]] = field(default_factory=dict)
    made: dict[str, dict[int, Vector]] = field(default_factory=dict)
    zeros: Mapping[str, Tensor] = field(default_factory=dict)

    def taken(self, walk: Walk, node: fx.Node, cached: CachedTensor) -> Value:
        """The value of an input that holds keys or values."""
        shape = node.meta["val"].shape
        if cached.name not in self.ids:
            self.ids[cached.name] = _fresh(walk.ids, shape)
        own = self.ids[cached.name]
        axes = tuple(Axis.of(own[dim]) if dim in own else Axis.plain(size) for dim, size in enumerate(shape))
        zeros = self.zeros.get(cached.name)
        if zeros is None or not walk.facts:
            return Value(axes)
        return Value(axes, Known(torch.zeros(zeros.shape).double(), zeros))

    def returned(self, walk: Walk, node: fx.Node, operand: fx.Node, cached: CachedTensor) -> None:
        """Relate an output that holds keys or values to the input that it will be."""
        value = walk.value(operand)
        for dim, axis in enumerate(value.axes):
            if dim not in (HEADS, CHANNELS):
                walk.pin_axis(node, axis, "the model returns it")
            elif dim in self.ids.get(cached.name, {}):
                walk.join(node, [Axis.of(self.ids[cached.name][dim]), axis])
            elif cached.taken is None and (ids := walk.vector(node, axis)) is not None:
                self.made.setdefault(cached.name, {})[dim] = ids

    def kept(self, kept: Kept) -> dict[str, dict[int, Tensor]]:
        """By name the heads and channels that stay, where not all do."""
        found: dict[str, dict[int, Tensor]] = {}
        for name, own in {**self.ids, **self.made}.items():
            for dim, ids in own.items():
                if not (alive := kept.alive(ids)).all():
                    found.setdefault(name, {})[dim] = torch.from_numpy(alive.nonzero()[0])
        return found

    def sizes(self, name: str) -> dict[int, int]:
        """How many heads and channels there were."""
        return {dim: len(ids) for dim, ids in {**self.ids, **self.made}[name].items()}


def _fresh(ids: Ids, shape: torch.Size) -> dict[int, Vector]:
    if len(shape) != 4:
        return {}
    return {dim: ids.fresh(shape[dim]) for dim in (HEADS, CHANNELS) if isinstance(shape[dim], int) and shape[dim] > 1}


@dataclass(frozen=True)
class CacheNodes:
    """Where the cached tensors of a graph are.

    Attributes:
        taken: by placeholder. returned: with the place among the flat outputs.
        lent: what is made of an encoder here. The graph that takes it has no weights that wrote it, so what is known
            of it here is not used: from both go the heads and channels that no weight reads.
    """

    taken: Mapping[fx.Node, CachedTensor]
    returned: Mapping[int, CachedTensor]
    lent: Set[fx.Node]

    @classmethod
    def of(cls, graph: fx.Graph) -> CacheNodes:
        """Those of a captured graph; tensors of another form than a layer's keys and values are left out."""
        placeholders = graph.find_nodes(op="placeholder")
        outputs = pytree.tree_leaves(graph.output_node().args)
        found = [
            cached
            for cached in cached_tensors(graph)
            if _holds_heads(outputs[cached.returned])
            and (cached.taken is None or _holds_heads(placeholders[cached.taken]))
        ]
        taken = {placeholders[cached.taken]: cached for cached in found if cached.taken is not None}
        lent = {outputs[cached.returned] for cached in found if cached.is_crossed and cached.taken is None}
        return cls(taken, {cached.returned: cached for cached in found}, lent)


def _holds_heads(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.dim() == 4


def cut_examples(traced: TracedModule, graph: fx.Graph, cached: CachedHeads, kept: Kept) -> None:
    """Leave of the sample inputs of a module what is kept of the keys and values in them."""
    leaves, structure = pytree.tree_flatten((traced.example_args, traced.example_kwargs))
    smaller = [_what_stays(leaf, own, kept) for leaf, own in zip(leaves, _ids_of_inputs(graph, cached), strict=True)]
    if any(one is not other for one, other in zip(leaves, smaller, strict=True)):
        args, kwargs = pytree.tree_unflatten(smaller, structure)
        traced.set_examples(args, kwargs)


def without_dead(leaves: Sequence[Any], graph: fx.Graph, cached: CachedHeads, kept: Kept) -> list[Any]:
    """Flat inputs, of whose keys and values those that go are zero, as a graph that kept them would write them."""
    found = []
    for leaf, own in zip(leaves, _ids_of_inputs(graph, cached), strict=True):
        for dim, ids in own.items():
            gone = torch.from_numpy(~kept.alive(ids)).nonzero().squeeze(1).to(leaf.device)
            leaf = leaf.index_fill(dim, gone, 0) if len(gone) else leaf
        found.append(leaf)
    return found


def _ids_of_inputs(graph: fx.Graph, cached: CachedHeads) -> list[Mapping[int, Vector]]:
    taken = CacheNodes.of(graph).taken
    nodes = graph.find_nodes(op="placeholder")
    return [cached.ids.get(taken[node].name, {}) if node in taken else {} for node in nodes]


def _what_stays(leaf: Any, own: Mapping[int, Vector], kept: Kept) -> Any:
    for dim, ids in own.items():
        alive = kept.alive(ids)
        if not alive.all():
            leaf = leaf.index_select(dim, torch.from_numpy(alive).nonzero().squeeze(1).to(leaf.device))
    return leaf


def written_zeros(walk: Walk, nodes: CacheNodes) -> dict[str, Tensor]:
    """By name which heads and channels a graph writes as zero into what it will read; those of which any are."""
    outputs, found = pytree.tree_leaves(walk.graph.output_node().args), {}
    for place, cached in nodes.returned.items():
        placeholder = next((node for node, each in nodes.taken.items() if each is cached), None)
        if placeholder is None:
            continue
        written = list(_written(outputs[place], placeholder))
        if not written:
            continue  # it is returned as it was given
        heads, channels = (int(placeholder.meta["val"].shape[dim]) for dim in (HEADS, CHANNELS))
        zeros = torch.ones(1, heads, 1, channels, dtype=torch.bool, device="cpu")
        for node in written:
            zeros &= _zeros(walk, node, heads, channels)
        if zeros.any():
            found[cached.name] = zeros
    return found


def _written(node: fx.Node, placeholder: fx.Node) -> Iterator[fx.Node]:
    """What a graph puts beside what was there; the result itself where that cannot be told."""
    if node is placeholder:
        return
    if node.target is aten.cat.default and placeholder in _sources(node):
        for part in node.args[0]:  # type: ignore[union-attr]
            yield from _written(part, placeholder)  # type: ignore[arg-type]
    elif node.target in _PASSING and placeholder in _sources(node):
        yield from _written(node.args[0], placeholder)  # type: ignore[arg-type]
    elif node.target in _WRITING and placeholder in _sources(node):
        yield from _written(node.args[0], placeholder)  # type: ignore[arg-type]
        yield node.args[3]  # type: ignore[misc]
    else:
        yield node


def _sources(node: fx.Node) -> set[fx.Node]:
    """A node, and what it passes on or joins."""
    found, pending = set[fx.Node](), [node]
    while pending:
        each = pending.pop()
        if each in found:
            continue
        found.add(each)
        if each.target is aten.cat.default:
            pending += each.all_input_nodes
        elif each.target in (*_PASSING, *_WRITING):
            pending.append(each.args[0])  # type: ignore[arg-type]
    return found


def _zeros(walk: Walk, node: fx.Node, heads: int, channels: int) -> Tensor:
    """Which heads and channels of a value are zero at every position."""
    zeros = walk.value(node).zeros
    if zeros.dim() != 4 or zeros.shape[HEADS] not in (1, heads) or zeros.shape[CHANNELS] not in (1, channels):
        return torch.zeros((), dtype=torch.bool)
    found: Tensor = zeros.all(0, keepdim=True).all(2, keepdim=True).expand(1, heads, 1, channels)
    return found
