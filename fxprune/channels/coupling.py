"""The relations of all graphs of a module, resolved: which slices stand or fall together, and what is constant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from fxprune.channels import rules
from fxprune.channels.cached_heads import CachedHeads, CacheNodes, written_zeros
from fxprune.channels.class_statistics import keep_statistics_of_class
from fxprune.channels.ids import Classes, Ids, Vector
from fxprune.channels.readers import Reader
from fxprune.channels.registry import relate
from fxprune.channels.used_weights import NO_WEIGHTS
from fxprune.channels.values import Value, on_cpu
from fxprune.channels.walk import Parameters, Walk
from fxprune.graph.error_sites import working_on
from fxprune.graph.mutation import is_mutating
from fxprune.graph.names import tensors_of
from fxprune.graph.traced import TracedModule

__all__ = ["Coupling", "couple", "coupling", "rules"]


@dataclass(repr=False)
class Coupling:
    """The relations of all graphs of a module, resolved.

    Attributes:
        walks: by mode; the eval walk also holds what is constant.
        classes: what the ids resolve to.
        stored: the parameters and buffers that the graphs read.
        cached: the keys and values that they take and return.
    """

    walks: dict[str, Walk]
    classes: Classes
    stored: Parameters
    cached: CachedHeads

    @property
    def parameters(self) -> dict[str, list[Vector | None]]:
        """Qualified name -> ids of each axis (None: size one)."""
        return self.stored.axes

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The parameters and buffers by qualified name."""
        return self.stored.tensors

    def of(self, ids: Vector) -> Vector:
        """The classes of ids."""
        return self.classes.of[ids]

    def forget_weights(self) -> None:
        """Let go of what walks hold of weights: of values only those that inputs reach are asked for any more."""
        for walk in self.walks.values():
            for reader in walk.readers:
                reader.table, reader.used = None, NO_WEIGHTS
            for node, value in walk.env.items():
                if isinstance(value, Value) and value.stored:
                    walk.env[node] = replace(value, facts=None)

    def forget_maps_of_one_graph(self) -> None:
        """Ask for constants of positions where the train graph has not the same layers."""
        twins = {reader.node: twin for reader, twin in self.readers()}
        for reader, twin in self.readers():
            if reader.maps is not None and (twin is None or twins.get(reader.maps.source) is None):
                reader.without_maps()

    def readers(self) -> Iterator[tuple[Reader, Reader | None]]:
        """The readers of the eval graph, each with the same layer's in the train graph.

        Layers are told by their parameters, and calls of one by their order.
        """
        twins: dict[object, list[Reader]] = {}
        for reader in self.walks["train"].readers if "train" in self.walks else ():
            if reader.key is not None:
                twins.setdefault(reader.key, []).append(reader)
        for queue in twins.values():
            queue.reverse()
        for reader in self.walks["eval"].readers:
            queue = twins.get(reader.key, [])
            yield reader, queue.pop() if queue else None


def coupling(traced: TracedModule, refused: Mapping[str, str] | None = None, *, for_class: bool = False) -> Coupling:
    """The coupling of a traced module's channels, constants not considered; the others are as for `couple`."""
    return couple(traced, traced.graphs, False, refused, for_class=for_class)


def couple(
    root: nn.Module,
    graphs: Mapping[str, fx.Graph],
    facts: bool = True,
    refused: Mapping[str, str] | None = None,
    *,
    for_class: bool = False,
    ranges: bool = True,
) -> Coupling:
    """Walk every graph over one set of ids; facts are taken from the eval graph.

    Args:
        root, graphs: what to walk.
        facts: whether constants are followed.
        refused: names of nodes whose channels stay, and why.
        ranges: whether what values lie between is followed, too.
        for_class: whether the class of the model is to take the statistics over the channels that are left.
    """
    stored = tensors_of(root)
    read = {str(node.target): None for graph in graphs.values() for node in graph.find_nodes(op="get_attr")}
    tensors = {name: stored[name] for name in read if name in stored and stored[name].numel()}
    zeros: Mapping[str, Tensor] = {}
    with torch.no_grad(), on_cpu():
        while True:
            ids, cached = Ids(), CachedHeads(zeros=zeros)
            parameters = replace(
                _tied(tensors, ids), refused=dict(refused or {}), trains="train" in graphs, follows_ranges=ranges
            )
            walks = {}
            if "eval" in graphs:  # first: reasons are reported in the order in which they were found
                walks["eval"] = walked(graphs["eval"], ids, parameters, cached, facts)
                more = written_zeros(walks["eval"], CacheNodes.of(graphs["eval"])) if facts else {}
                if any(not torch.equal(where, zeros.get(name, ~where)) for name, where in more.items()):
                    zeros = more  # what is written as zero will be found as zero, which may make more zero
                    continue
            break
        if "train" in graphs:
            walks["train"] = walked(graphs["train"], ids, parameters, cached, False)
        if for_class:
            keep_statistics_of_class(list(walks.values()))
    found = Coupling(walks, ids.solve(), parameters, cached)
    if len(graphs) > 1:
        found.forget_maps_of_one_graph()
    return found


def walked(
    graph: fx.Graph, ids: Ids, parameters: Parameters, cached: CachedHeads, facts: bool, *, training: bool = False
) -> Walk:
    """The walk over a graph, node by node; the arguments are those of `Walk`, and what is known of caches."""
    walk, nodes = Walk(graph, ids, parameters, facts, training=training), CacheNodes.of(graph)
    for node in graph.nodes:
        with working_on(node):
            if node in nodes.taken:
                walk.env[node] = cached.taken(walk, node, nodes.taken[node])
            elif node.op == "output":
                _visit_outputs(walk, node, cached, nodes)
            else:
                _visit(walk, node)
            if node in nodes.lent:
                walk.env[node] = replace(walk.value(node), facts=None)
    return walk


def _visit_outputs(walk: Walk, node: fx.Node, cached: CachedHeads, nodes: CacheNodes) -> None:
    for place, value in enumerate(pytree.tree_leaves(node.args)):
        if place in nodes.returned:
            cached.returned(walk, node, value, nodes.returned[place])
        elif isinstance(value, fx.Node):
            walk.pin_operand(node, value, "the model returns it")


def _visit(walk: Walk, node: fx.Node) -> None:
    if node.op == "placeholder":
        walk.env[node] = walk.unknown(node)
    elif node.op == "get_attr":
        walk.env[node] = walk.parameter(node)
    elif node.op == "call_function":
        walk.env[node] = relate(walk, node)
        if is_mutating(node):
            walk.mutate(node)


def _tied(tensors: Mapping[str, Tensor], ids: Ids) -> Parameters:
    """Ids for every axis, one set for all names of a tensor; tensors that overlap without being one are pinned."""
    names_of: dict[Tensor, list[str]] = {}
    for name, tensor in tensors.items():
        names_of.setdefault(tensor, []).append(name)
    axes: dict[str, list[Vector | None]] = {}
    for tensor, names in names_of.items():
        own = [ids.fresh(size) if size != 1 else None for size in tensor.shape]
        axes |= dict.fromkeys(names, own)
    overlapping: dict[str, list[str]] = {}
    for tensors_together in _overlapping(list(names_of)):
        together = [name for tensor in tensors_together for name in names_of[tensor]]
        if len(together) > 1:
            overlapping |= dict.fromkeys(together, together)
        first = names_of[tensors_together[0]][0]
        for tensor in tensors_together[1:]:
            name = names_of[tensor][0]
            reason = partial("`{}` and `{}` share memory".format, name, first)
            for vector in (*axes[name], *axes[first]):
                if vector is not None:
                    ids.pin(vector, reason)
    return Parameters(dict(tensors), axes, overlapping)


def _overlapping(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Tensors in groups whose bytes overlap, in the order of the first of each."""
    order = {tensor: i for i, tensor in enumerate(tensors)}
    groups: list[list[Tensor]] = []
    end, device = -1, None
    for tensor in sorted(tensors, key=lambda t: (str(t.device), t.data_ptr(), order[t])):
        if tensor.device.type == "meta":  # no memory
            groups.append([tensor])
        elif groups and tensor.device == device and tensor.data_ptr() < end:
            groups[-1].append(tensor)
            end = max(end, _end(tensor))
        else:
            groups.append([tensor])
            end, device = _end(tensor), tensor.device
    for group in groups:
        group.sort(key=order.__getitem__)
    return sorted(groups, key=lambda group: order[group[0]])


def _end(tensor: Tensor) -> int:
    """The address behind the last byte of a tensor."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()
