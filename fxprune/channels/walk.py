"""The walk over one graph: the value of every node, and what the operators' rules record on the way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx

from fxprune.channels.axes import ONE, Axis, Factor, Size, reduced_shape, same_size
from fxprune.channels.edits import Edit, Reindex
from fxprune.channels.ids import Ids, Vector
from fxprune.channels.means import SpaceMeans
from fxprune.channels.positions import PositionMaps
from fxprune.channels.readers import Balance, EqualCounts, MoreCells, Reader
from fxprune.channels.values import Known, Stack, Value, beside, settled
from fxprune.graph.mutation import draws, memory_of, memory_sources, written
from fxprune.graph.text import describe

# why channels stay: with fewer of them, the generator gives other numbers to those that are left
DRAWS = "draws at random in eval mode, too"

# of a node: a tensor's value, those of several tensors, or None for what is no tensor
Result: TypeAlias = "Value | list[Value] | None"


@dataclass(frozen=True)
class Parameters:
    """The parameters and buffers of a module, as every walk over its graphs sees them.

    Attributes:
        tensors: by qualified name.
        axes: the ids of each axis by qualified name, None for one of size one; tied names share them.
        overlapping: for a name that shares memory with others, all of these.
        grouped: by the weight of a grouped convolution the ids of the inputs that it reads, the same in every call.
        refused: names of nodes whose channels stay, and why, whatever their rules say.
        trains: whether there is a train graph.
        follows_ranges: whether channels go that what values lie between makes constant.
    """

    tensors: dict[str, Tensor]
    axes: dict[str, list[Vector | None]]
    overlapping: Mapping[str, list[str]]
    grouped: dict[Tensor, Vector] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    trains: bool = False
    follows_ranges: bool = True


@dataclass(frozen=True, eq=False)
class Range:
    """What a node's values lie between, whatever comes in; tensors that broadcast to its reduced shape.

    Attributes:
        low, high: both ends, which may be infinite.
    """

    low: Tensor
    high: Tensor


class Walk:
    """What is found in one graph; filled in by the rules of its operators.

    Attributes:
        graph: the graph.
        ids: shared between the walks of one module.
        parameters: likewise.
        facts: whether constants are followed; else ids are related only, for a graph that shares its parameters with
            one that is analyzed.
        training: whether constants are followed through what train mode does to them, to be compared, not removed: a
            channel that is the same everywhere is its own mean, and dropouts keep it on average.
        env: the value of every node.
        maps: of nodes some of whose channels are constants of positions.
        means: of nodes some of whose channels have a mean over space that is known.
        means_of_parts: likewise, of nodes with several results.
        ranges: of nodes whose values lie between numbers.
        by_range: the nodes of which that makes entries constant.
        readers, balances: the contractions met.
        equal: the recurrent layers met. more: those with a projection.
        edits: what removal changes in the graph.
        reindexed: stored indices that shift.
        aligned: the id vectors of each convolution, and whether it is depthwise.
        nonempty: id vectors of which something must remain.
        normalized: id vectors of channels that are normalized together, layer by layer.
        equal_groups: ids [groups, n] of which each group that is left keeps equally many.
        uses: how often each parameter is read.
        singles: of nodes that are single channels, and that only stacks read, the id as a vector of one.
    """

    def __init__(
        self, graph: fx.Graph, ids: Ids, parameters: Parameters, facts: bool, *, training: bool = False
    ) -> None:
        self.graph, self.ids, self.facts, self.parameters = graph, ids, facts, parameters
        self.training = training
        self.env: dict[fx.Node, Result] = {}
        self.maps: dict[fx.Node, PositionMaps] = {}
        self.means: dict[fx.Node, SpaceMeans] = {}
        self.means_of_parts: dict[fx.Node, list[SpaceMeans]] = {}
        self.ranges: dict[fx.Node, Range] = {}
        self.by_range: set[fx.Node] = set()
        self.readers: list[Reader] = []
        self.balances: list[Balance] = []
        self.equal: list[EqualCounts] = []
        self.more: list[MoreCells] = []
        self.edits: list[Edit] = []
        self.reindexed: list[Reindex] = []
        self.aligned: list[tuple[list[Vector], bool]] = []
        self.nonempty: list[Vector] = []
        self.normalized: list[Vector] = []
        self.equal_groups: list[Vector] = []
        self.uses: dict[str, int] = {}
        self.singles: dict[fx.Node, Vector] = {}
        for read in graph.find_nodes(op="get_attr"):
            self.uses[str(read.target)] = self.uses.get(str(read.target), 0) + len(read.users)
        self._storage = _Storage(graph)
        self._written = memory_of(target for node in graph.nodes for target in _overwritten(node))
        self._written_names = {str(node.target) for node in self._written if node.op == "get_attr"}

    # ---- values of nodes

    def value(self, operand: Any) -> Value:
        """The value of a tensor operand."""
        found = self.env[operand]
        assert isinstance(found, Value), operand
        if isinstance(found, Stack):
            for part in found.parts[1:]:
                self.join(operand, [found.axes[-1], part.axes[-1]])
            self.env[operand] = found = found.common
        return found

    def stack(self, node: fx.Node, base: fx.Node) -> Stack | None:
        """The value of the operand that an operator may return a part of, where it is a stack."""
        found = self.env[base]
        if not isinstance(found, Stack):
            return None
        self.shared_storage(node, base)
        return found

    def viewed(self, node: fx.Node, base: fx.Node) -> Value:
        """The value of the operand that an operator may return a view of."""
        self.shared_storage(node, base)
        return self.value(base)

    def shape(self, node: fx.Node) -> Sequence[Size]:
        """Of a node's value, or of the first of several."""
        value = node.meta["val"]
        return tuple((value[0] if isinstance(value, list | tuple) else value).shape)

    def unknown(self, node: fx.Node) -> Result:
        """Opaque values in the shapes that the node has."""
        found: Result = _opaque(node.meta.get("val"))
        return found

    def parameter(self, node: fx.Node) -> Result:
        """What a `get_attr` node reads."""
        name = str(node.target)
        if name not in self.parameters.axes:
            return self.unknown(node)
        tensor = self.parameters.tensors[name]
        axes = tuple(
            Axis.plain(size) if ids is None else Axis.of(ids)
            for size, ids in zip(tensor.shape, self.parameters.axes[name], strict=True)
        )
        if name in self._written_names:
            self.pin_value(node, Value(axes), "a buffer that the graph writes to")
            return Value(axes)
        return Value(axes, Known.tensor(tensor.detach().cpu()) if self.facts else None, source=name)

    def stored(self, operand: fx.Node) -> Tensor | None:
        """The numbers of an operand that is a parameter or buffer, or computed from such alone; None of any other."""
        found = self.env.get(operand)
        return found.facts.value if isinstance(found, Value) and found.stored and found.facts is not None else None

    def reads(self, name: str) -> list[fx.Node]:
        """The nodes of the graph that read a parameter, by any of its names."""
        tensor = self.parameters.tensors[name]
        found = self.graph.find_nodes(op="get_attr")
        return [node for node in found if self.parameters.tensors.get(str(node.target)) is tensor]

    def is_read_once(self, name: str | None) -> bool:
        """Whether a parameter has one reader in the graph."""
        return name is not None and self.uses.get(name) == 1

    def is_alone(self, name: str | None) -> bool:
        """Whether a parameter has one reader in the graph, and its memory no other name."""
        return name is not None and self.is_read_once(name) and name not in self.parameters.overlapping

    # ---- constants of positions, and means

    def pass_maps(self, operand: fx.Node, node: fx.Node) -> None:
        """The same values under another node."""
        if operand in self.maps:
            self.maps[node] = self.maps[operand]
        if operand in self.means:
            self.means[node] = self.means[operand]

    def note_means(
        self, node: fx.Node, value: Value, where: Tensor, means: Tensor, space: Sequence[int] | None = None
    ) -> None:
        """Note the means over space of a node's channels, where they are finite; both in the value's reduced shape.

        Args:
            node, value, where, means: of which channels.
            space: the axes of space; None where those are all behind axis 1.
        """
        where = where & means.isfinite()
        if where.any():
            shape = reduced_shape(value.axes)
            space = tuple(range(2, len(shape)) if space is None else space)
            self.means[node] = SpaceMeans(where.expand(shape), means.double().expand(shape), space)

    def with_means(
        self, operand: fx.Node, value: Value, windows: Sequence[int] | None = None, over: Sequence[int] | None = None
    ) -> Value:
        """A value, of which more is known where it is to be read by its means over space.

        Args:
            operand, value: the node, and what is known of it.
            windows: the means are over windows of these sizes, which tile space; None where they are over all of it.
            over: the axes over which they are; None where those are all behind axis 1.
        """
        means, maps, shape = self.means.get(operand), self.maps.get(operand), reduced_shape(value.axes)
        behind = list(range(2, value.rank))
        over = behind if over is None else list(over)
        if means is not None and windows is None and means.are_over(value.axes, over):
            value = beside(value, means.where, means.value)
        if over != behind or maps is None or not maps.fits(shape) or (mean := maps.means(windows)) is None:
            return value
        return beside(value, maps.where.view(shape), mean.view(shape))

    def note_maps(self, node: fx.Node, value: Value, like: PositionMaps, where: Tensor, computed: Tensor) -> Value:
        """Note what a node's channels are by position, and add to its value those that are the same everywhere.

        Args:
            node, value: the node, and what else is known of it.
            like: maps of the same border.
            where: in the value's reduced shape, which channels are known by position.
            computed: their values, with the pairs in the place of a batch.
        """
        shape = where.shape
        where = where & computed.isfinite().all(0, keepdim=True)
        same = where & (computed == computed[:1]).all(0, keepdim=True)
        varying = (where & ~same).reshape(-1)
        if varying.any():
            values = computed.double().expand(computed.shape[0], *shape[1:]).reshape(len(computed), -1)
            self.maps[node] = replace(like, where=varying, values=values)
        if not same.any():
            return value
        facts, first = value.facts, computed[:1].double()
        if facts is None:
            return settled(value.axes, same, torch.where(same, first, 0))
        return settled(value.axes, facts.where | same, torch.where(same, first, facts.value), facts.border)

    # ---- what must stay

    def pin(self, node: fx.Node, ids: Vector | None, why: str) -> None:
        """Ids that stay because of what `node` does."""
        if ids is not None:
            self.ids.pin(ids, lambda: f"{describe(node)}: {why}", node)

    def pin_axis(self, node: fx.Node, axis: Axis, why: str) -> None:
        for factor in axis:
            self.pin(node, factor.ids, why)

    def pin_value(self, node: fx.Node, value: Result, why: str) -> None:
        """All axes of a value, of each of several."""
        for tensor in value if isinstance(value, list) else [value]:
            for part in tensor.parts if isinstance(tensor, Stack) else [tensor]:
                for axis in () if part is None else part.axes:
                    self.pin_axis(node, axis, why)

    def pin_operand(self, node: fx.Node, operand: fx.Node, why: str) -> None:
        """All axes of an operand."""
        self.pin_value(node, self.env.get(operand), why)

    def recorded(self) -> tuple[int, ...]:
        """How much rules have recorded, for `forget_since`."""
        return tuple(map(len, self._records))

    def forget_since(self, recorded: tuple[int, ...]) -> None:
        """Forget what was recorded since; relations of ids, which only keep more channels, stay."""
        for records, count in zip(self._records, recorded, strict=True):
            del records[count:]

    @property
    def _records(self) -> tuple[list[Any], ...]:
        return (
            self.readers, self.balances, self.equal, self.more, self.edits, self.reindexed, self.aligned,
            self.nonempty, self.normalized, self.equal_groups,
        )  # fmt: skip

    def draws(self, node: fx.Node) -> bool:
        """Whether a call draws random numbers that must stay as they are; of another size it would draw others."""
        return self.facts and not self.training and draws(node)

    def refuse(self, node: fx.Node, why: str) -> Result:
        """Pin everything that `node` touches; nothing is known of its results."""
        self.maps.pop(node, None)
        self.means.pop(node, None)
        self.means_of_parts.pop(node, None)
        self.ranges.pop(node, None)
        for operand in node.all_input_nodes:
            self.pin_operand(node, operand, why)
            self.pin(node, self.singles.get(operand), why)
        return self.unknown(node)

    # ---- axes

    def vector(self, node: fx.Node, axis: Axis) -> Vector | None:
        """The ids of an axis, one per index; None for an opaque one. Pins ids that merge with a symbolic factor."""
        if len(axis) == 1:
            return axis.ids
        if not axis.carries:
            return None
        if not all(type(factor.size) is int for factor in axis):
            self.pin_axis(node, axis, "merged with an axis of free size")
            return None
        return self._merged_ids(axis)

    def _merged_ids(self, axis: Axis) -> Vector | None:
        """The ids of the row-major product of factors: a position stays while all its factors' ids do."""
        whole: Vector | None = None
        inner = 1  # indices of the opaque factors inside of the first that carries ids
        for factor in reversed(axis.factors):
            if whole is None and factor.ids is None:
                inner *= factor.size
            elif whole is None:
                assert factor.ids is not None
                whole = np.repeat(factor.ids, inner)
            else:
                whole = np.tile(whole, factor.size) if factor.ids is None else self.ids.product(factor.ids, whole)
        return whole

    def flat(self, node: fx.Node, value: Value, dim: int) -> Value:
        """`value` with the factors of one axis merged into one."""
        axis = value.axes[dim]
        if len(axis) <= 1:
            return value
        return value.relayout(dim, Axis.carrying(axis.size, self.vector(node, axis)))

    def merged(self, node: fx.Node, value: Value, dim: int) -> tuple[Value, Vector | None]:
        """`value` with the factors of one axis merged, and the ids of this axis."""
        value = self.flat(node, value, dim)
        return value, value.axes[dim].ids

    def blur(self, node: fx.Node, value: Value, dims: Iterable[int], why: str) -> Value:
        """`value` with the given axes opaque: their ids pinned, only what is uniform along them known."""
        for dim in dims:
            if value.axes[dim].carries:
                self.pin_axis(node, value.axes[dim], why)
                value = value.relayout(dim, value.axes[dim].opaque())
        return value

    def join(self, node: fx.Node, axes: Iterable[Axis]) -> Axis:
        """Unify axes that broadcast against each other."""
        present = [axis for axis in axes if not axis.is_one]
        if not present:
            return ONE
        first = present[0]
        if len(present) == 1 or not any(axis.carries for axis in present):
            return first
        # of one factor each they are of one size, though symbols may spell it in several ways
        if not all(len(axis) == 1 for axis in present) and not all(_same_factors(axis, first) for axis in present):
            return self.join(node, self._alike(node, present))
        return Axis(tuple(self._joined(node, factors) for factors in zip(*present, strict=True)))

    def _alike(self, node: fx.Node, axes: Sequence[Axis]) -> list[Axis]:
        """Axes of one size by factors of the same sizes: those are merged that differ, between what is the same."""
        most = min(map(len, axes)) - 1  # something differs
        outer = _common([axis.factors[:most] for axis in axes])
        inner = _common([axis.factors[::-1][: most - outer] for axis in axes])
        found = []
        for axis in axes:
            end = len(axis) - inner
            run = Axis(axis.factors[outer:end])
            merged = Factor(run.size, self.vector(node, run))
            found.append(Axis((*axis.factors[:outer], merged, *axis.factors[end:])))
        if all(_same_factors(axis, found[0]) for axis in found):
            return found
        return [Axis.carrying(axis.size, self.vector(node, axis)) for axis in axes]

    def _joined(self, node: fx.Node, factors: Sequence[Factor]) -> Factor:
        vectors = [factor.ids for factor in factors if factor.ids is not None]
        if len(vectors) < len(factors):
            for ids in vectors:
                self.pin(node, ids, "meets an axis that carries no channels")
            return factors[0].opaque()
        for ids in vectors[1:]:
            self.ids.unify(vectors[0], ids)
        return factors[0]

    def broadcast(self, node: fx.Node, values: Sequence[Value]) -> tuple[tuple[Axis, ...], list[Value]]:
        """Joined axes of values that broadcast against each other, and the values laid out that way."""
        rank = max((value.rank for value in values), default=0)
        padded = [value if value.rank == rank else value.lead(rank - value.rank) for value in values]
        joined = []
        for dim in range(rank):
            axis = self.join(node, [value.axes[dim] for value in padded])
            joined.append(axis)
            padded = [
                value if value.axes[dim] is axis or value.axes[dim].is_one else value.relayout(dim, axis)
                for value in padded
            ]
        return tuple(joined), padded

    def taken(self, node: fx.Node, ids: Vector) -> Axis:
        """The axis of a selection of indices."""
        if len(ids) == 1:
            self.pin(node, ids, "a single index is taken")
            return ONE
        self.nonempty.append(ids)
        return Axis.of(ids)

    def single(self, node: fx.Node, taken: fx.Node, ids: Vector) -> None:
        """One channel, as a tensor without its axis: where only stacks read it, these carry it on; else it stays.

        Args:
            node: takes it.
            taken: the node that is it.
            ids: its id, a vector of one.
        """
        stacked = all(user.target is torch.ops.aten.stack.default for user in taken.users)
        if stacked and not self.is_written(taken):
            self.singles[taken] = ids
        else:
            self.pin(node, ids, "a single index is taken")

    # ---- memory that values share

    def shared_storage(self, result: fx.Node, base: fx.Node) -> None:
        """`result` may be a view of `base`."""
        self._storage.share(result, base)

    def sharing(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that may share memory with a node, itself among them."""
        return self._storage.family(node)

    def is_written(self, node: fx.Node) -> bool:
        """Whether the graph writes to the value of `node`, through views as well."""
        return node in self._written

    def is_rewritten(self, node: fx.Node) -> bool:
        """Whether the graph writes behind `node` to memory that it may share."""
        return self._storage.is_rewritten(node)

    def is_written_name(self, name: str) -> bool:
        """Whether the graph writes to a buffer."""
        return name in self._written_names

    def mutate(self, node: fx.Node) -> None:
        """Forget what was known of values that `node` writes to; what it returns is their new value."""
        result = self.env[node]
        for target in _overwritten(node):
            for other in self._storage.family(target):
                if other is not node:
                    self.maps.pop(other, None)
                    self.means.pop(other, None)
                    self.ranges.pop(other, None)
                if other is not node and isinstance(self.env.get(other), Value):
                    self.env[other] = Value(self.value(other).axes)
            if isinstance(result, Value) and result.rank == len(self.shape(target)):
                self.env[target] = result.without_source()


class _Storage:
    """Which nodes may lie in the same memory: views of one another, and what is written and what comes of that."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._told: dict[fx.Node, list[fx.Node]] = {}
        self._place = {node: place for place, node in enumerate(graph.nodes)}
        self._last_write = {target: self._place[node] for node in graph.nodes for target in _overwritten(node)}
        self._find()

    def _find(self) -> None:
        """Where the memory of each node may come from, and which nodes may have it of the same."""
        self._roots: dict[fx.Node, dict[fx.Node, None]] = {}
        self._members: dict[fx.Node, list[fx.Node]] = {}
        for node in self._graph.nodes:
            sources = [*memory_sources(node), *self._told.get(node, ())]
            self._roots[node] = {root: None for source in sources for root in self._roots[source]} or {node: None}
            for root in self._roots[node]:
                self._members.setdefault(root, []).append(node)

    def share(self, result: fx.Node, base: fx.Node) -> None:
        if not self._roots[base].keys() <= self._roots[result].keys():  # by no schema
            self._told.setdefault(result, []).append(base)
            self._find()

    def family(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that may lie in the memory of one; that itself alone where an edit has put it there."""
        roots = self._roots.get(node, {})
        return list(dict.fromkeys(member for root in roots for member in self._members[root])) or [node]

    def is_rewritten(self, node: fx.Node) -> bool:
        place = self._place[node]
        return any(self._last_write.get(other, place) > place for other in self.family(node))


def _opaque(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Value(tuple(Axis.plain(size) for size in value.shape))
    return [_opaque(item) for item in value] if isinstance(value, list | tuple) else None


def _common(axes: Sequence[tuple[Factor, ...]]) -> int:
    """How many of their first factors are of the same sizes."""
    alike = (all(same_size(own.size, first.size) for own in others) for first, *others in zip(*axes, strict=True))
    return next((i for i, same in enumerate(alike) if not same), len(axes[0]))


def _same_factors(axis: Axis, other: Axis) -> bool:
    return len(axis) == len(other) and all(
        same_size(factor.size, twin.size) for factor, twin in zip(axis, other, strict=True)
    )


def _overwritten(node: fx.Node) -> list[fx.Node]:
    """The operands whose values a node changes; `detach_` counts as writing and changes none."""
    return [] if node.target is torch.ops.aten.detach_.default else written(node)
