"""Data movement that takes parts: slices, single indices, splits, lookups."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx, nn

from fxprune.channels.axes import Axis, same_size
from fxprune.channels.edits import (
    Count,
    DropItems,
    Extent,
    HoldIndex,
    LeaveStacks,
    PartSizes,
    Reindex,
    ReplaceCall,
    SetArguments,
    TakeIndices,
)
from fxprune.channels.ids import Vector
from fxprune.channels.registry import REGISTRY, OperatorCall, register
from fxprune.channels.values import Value
from fxprune.channels.walk import Result, Walk
from fxprune.graph.expressions import is_repeatable
from fxprune.graph.interpretation import run_nodes

aten = torch.ops.aten
# torch.export's end of a slice that takes everything
_END = 2**63 - 1


@dataclass(frozen=True, eq=False)
class _Parts(OperatorCall):
    """Parts of one axis, as views of the operand."""

    data: fx.Node
    dim: int

    def _operand(self, walk: Walk) -> tuple[Value, int]:
        """The operand's value, and the axis counted from the first."""
        value = walk.viewed(self.node, self.data)
        return value, self.dim % value.rank

    def _opened(
        self, walk: Walk, value: Value, dim: int, *positions: Any, free: str = ""
    ) -> tuple[Value, Vector | None]:
        """The value with the factors of the axis merged, and the ids of its indices.

        Where it carries none, or a position is no number, the axis is opaque, and its ids None: `free` says why.
        """
        value, ids = walk.merged(self.node, value, dim)
        if ids is not None and all(position is None or isinstance(position, int) for position in positions):
            return value, ids
        return walk.blur(self.node, value, [dim], free), None


@register(aten.slice.Tensor)
@dataclass(frozen=True, eq=False)
class Slice(_Parts):
    """A range of indices."""

    start: Any
    end: Any
    step: Any

    def relate(self, walk: Walk) -> Value:
        value, dim = self._operand(walk)
        axis, size = value.axes[dim], walk.shape(self.node)[dim]
        if same_size(axis.size, size) and self.step == 1:
            if axis.carries and (self.start, self.end) != (0, _END):
                walk.edits.append(SetArguments(self.node, {"start": 0, "end": _END}))
            return value.without_source()
        value, ids = self._opened(walk, value, dim, self.start, self.end, free="sliced at a free position")
        if ids is None:
            return value.cut(dim, Axis.plain(size))
        taken = np.arange(len(ids))[self.start : self.end : self.step]
        if self.step == 1:
            first, last, _ = slice(self.start, self.end).indices(len(ids))
            walk.edits.append(SetArguments(self.node, {"start": Count(ids[:first]), "end": Count(ids[:last])}))
        elif walk.is_written(self.node) or walk.is_written(self.data):  # an index would copy
            walk.pin(self.node, ids, "taken by stride from what is written to")
        else:
            walk.edits.append(TakeIndices(self.node, self.data, dim, ids, taken))
        return taken_from(walk, self.node, value, dim, ids, taken)


def taken_from(walk: Walk, node: fx.Node, value: Value, dim: int, ids: Vector, index: Vector) -> Value:
    """The indices `index` of an axis that carries `ids`."""
    axes = value.replaced_axis(dim, walk.taken(node, ids[index]))
    picked = torch.from_numpy(index)
    return value.moved(axes, lambda tensor: tensor.index_select(dim, picked))


@register(aten.narrow)
@dataclass(frozen=True, eq=False)
class Narrow(_Parts):
    """A range of indices by its start and length."""

    start: Any
    length: Any

    def relate(self, walk: Walk) -> Value:
        value, dim = self._operand(walk)
        axis, size = value.axes[dim], walk.shape(self.node)[dim]
        if same_size(axis.size, size):
            walk.edits.append(SetArguments(self.node, {"length": Extent(self.length, axis)}))
            return value.without_source()
        value, ids = self._opened(walk, value, dim, self.start, self.length, free="sliced at a free position")
        if ids is None:
            return value.cut(dim, Axis.plain(size))
        first = self.start % len(ids)
        last = first + self.length
        counts = {"start": Count(ids[:first]), "length": Count(ids[first:last])}
        walk.edits.append(SetArguments(self.node, counts))
        return taken_from(walk, self.node, value, dim, ids, np.arange(first, last))


@register(aten.select.int)
@dataclass(frozen=True, eq=False)
class Select(_Parts):
    """A single index, whose axis goes."""

    index: Any

    def relate(self, walk: Walk) -> Value:
        stack = walk.stack(self.node, self.data) if isinstance(self.index, int) else None
        if stack is not None and self.dim % stack.rank == 0:
            return stack.parts[int(self.index)]
        value, dim = self._operand(walk)
        rest = value.replaced_axis(dim)
        value, ids = self._opened(walk, value, dim, self.index, free="selected at a free position")
        if ids is None:
            return value.moved(rest, lambda tensor: tensor.squeeze(dim))
        index = self.index % len(ids)
        own = ids[index : index + 1]
        walk.single(self.node, self.node, own)
        walk.edits.append(SetArguments(self.node, {"index": Count(ids[:index])}))
        if self.node in walk.singles:
            walk.edits.append(LeaveStacks(self.node, own))
        return value.moved(rest, lambda tensor: tensor.select(dim, index))


@register(
    aten.split, aten.split_with_sizes, aten.chunk, aten.unsafe_split, aten.unsafe_split_with_sizes, aten.unsafe_chunk,
    aten.tensor_split,
)  # fmt: skip
@dataclass(frozen=True, eq=False)
class Split(_Parts):
    """An axis in consecutive parts; their sizes may become unequal."""

    def relate(self, walk: Walk) -> list[Value]:
        value, dim = self._operand(walk)
        sizes = [part.shape[dim] for part in self.node.meta["val"]]
        value, ids = self._opened(walk, value, dim)
        if ids is None:
            return [value.cut(dim, Axis.plain(size)) for size in sizes]
        ends = np.cumsum(sizes)
        parts = np.split(ids, ends[:-1])
        read = _read_items(self.node)
        results = [
            taken_from(walk, self.node, value, dim, ids, np.arange(int(end) - len(part), int(end)))
            if number in read
            else Value(value.replaced_axis(dim, Axis.of(part)))
            for number, (part, end) in enumerate(zip(parts, ends, strict=True))
        ]
        walk.edits += [self._in_parts(walk, dim, parts), DropItems(self.node, parts, results)]
        means = walk.means.get(self.data)
        if means is not None and dim not in means.space:
            walk.means_of_parts[self.node] = [
                means.moved(functools.partial(torch.narrow, dim=dim, start=int(end) - size, length=size))
                for end, size in zip(ends, sizes, strict=True)
            ]
        return results

    def _in_parts(self, walk: Walk, dim: int, parts: list[Vector]) -> ReplaceCall:
        """The call with the sizes that stay, by an operator that allows what the captured one does.

        The parts of `tensor_split` and `unsafe_split` may be written to where gradients are recorded, others may not.
        """
        target = REGISTRY.model(self.node.target)
        if target in _AT_POSITIONS and walk.is_written(self.node):
            return ReplaceCall(self.node, aten.tensor_split.indices, (self.data, PartSizes(parts, as_ends=True), dim))
        split = aten.unsafe_split_with_sizes if target in _UNSAFE else aten.split_with_sizes
        return ReplaceCall(self.node, split.default, (self.data, PartSizes(parts), dim))


_AT_POSITIONS = (aten.tensor_split.sections, aten.tensor_split.indices, aten.tensor_split.tensor_indices_or_sections)
_UNSAFE = (aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default, aten.unsafe_chunk.default)


@register(aten.unbind)
@dataclass(frozen=True, eq=False)
class Unbind(_Parts):
    """Every index of an axis as a tensor of its own."""

    def relate(self, walk: Walk) -> list[Value]:
        stack = walk.stack(self.node, self.data)
        if stack is not None and self.dim % stack.rank == 0:
            return list(stack.parts)
        value, dim = self._operand(walk)
        rest = value.replaced_axis(dim)
        value, ids = self._opened(walk, value, dim)
        places = [0 if ids is None else index for index in range(len(self.node.meta["val"]))]
        results = [value.moved(rest, functools.partial(torch.select, dim=dim, index=place)) for place in places]
        if ids is not None:
            self._take(walk, ids)
            walk.edits.append(DropItems(self.node, list(ids[:, None]), results))
        return results

    def _take(self, walk: Walk, ids: Vector) -> None:
        """Note what becomes of every index that is read."""
        if any(user.target is not operator.getitem for user in self.node.users):
            walk.pin(self.node, ids, "a single index is taken")
            return
        for user in self.node.users:
            if user.users:
                index = int(user.args[1])  # type: ignore[arg-type]
                walk.single(self.node, user, ids[index : index + 1])
                if user in walk.singles:
                    walk.edits.append(LeaveStacks(user, ids[index : index + 1]))


def _read_items(node: fx.Node) -> set[int]:
    """Which of several results anything reads."""
    if any(user.target is not operator.getitem for user in node.users):
        return {*range(len(node.meta["val"]))}
    return {int(user.args[1]) for user in node.users if user.users}  # type: ignore[arg-type]


@register(aten.index.Tensor)
@dataclass(frozen=True, eq=False)
class Index(OperatorCall):
    """Indices given by tensors, None for whole axes."""

    data: fx.Node
    indices: list[Any]

    def relate(self, walk: Walk) -> Result:
        return indexed(walk, self.node, self.data, self.indices)


@register(aten.index_select)
@dataclass(frozen=True, eq=False)
class IndexSelect(OperatorCall):
    """Indices of one axis given by a tensor."""

    data: fx.Node
    dim: int
    index: fx.Node

    def relate(self, walk: Walk) -> Result:
        dim = self.dim % walk.value(self.data).rank
        return indexed(walk, self.node, self.data, [None] * dim + [self.index])


def indexed(walk: Walk, node: fx.Node, data: fx.Node, indices: list[Any]) -> Result:
    """What an index by tensors takes; a stored index into one axis shifts with it."""
    value = walk.value(data)
    used = [dim for dim, index in enumerate(indices) if index is not None]
    if len(used) == 1:
        found = _indexed_by_constant(walk, node, data, used[0], indices[used[0]])
        if found is not None:
            return found
    return _indexed_by_data(walk, node, value, used, indices)


def _indexed_by_constant(walk: Walk, node: fx.Node, data: fx.Node, dim: int, index: fx.Node) -> Value | None:
    constant = walk.value(index)
    value = walk.flat(node, walk.value(data), dim)
    ids, positions = value.axes[dim].ids, _stored_index(walk, index)
    if ids is None or positions is None or constant.rank != 1:
        return None
    order = positions.long().reshape(-1) % len(ids)
    taken = ids[order.numpy()]
    axis = walk.taken(node, taken)
    own = walk.vector(index, constant.axes[0])
    if own is not None:
        walk.ids.unify(own, taken)
    name = _read_by(index)
    if name is not None and walk.is_read_once(name):
        walk.reindexed.append(Reindex(name, ids, order))
    else:
        walk.edits.append(HoldIndex(node, data, dim, ids, order.numpy()))
    return value.moved(value.replaced_axis(dim, axis), lambda tensor: tensor.index_select(dim, order))


def _stored_index(walk: Walk, index: fx.Node) -> torch.Tensor | None:
    """The positions that an index takes, where no input changes them; those of a buffer are known without facts too."""
    value, name = walk.value(index), _read_by(index)
    if value.stored and value.facts is not None:
        found: torch.Tensor = value.facts.value
    elif name is not None and name in walk.parameters.tensors and not walk.is_written_name(name):
        found = walk.parameters.tensors[name].detach().cpu()
    else:
        computed = _computed_index(walk, index)
        if computed is None:
            return None
        found = computed
    return None if found.is_floating_point() or found.dtype in (torch.bool, torch.uint8) else found


def _computed_index(walk: Walk, index: fx.Node) -> torch.Tensor | None:
    """An index that is computed from numbers and buffers that nothing writes, as `arange` is; None for any other."""
    steps, pending = {index}, [index]
    while pending and len(steps) <= _MOST_STEPS:
        node = pending.pop()
        if node.op == "get_attr":
            name = str(node.target)
            if name not in walk.parameters.tensors or walk.is_written_name(name):
                return None
        elif not is_repeatable(node):
            return None
        fresh = [operand for operand in node.all_input_nodes if operand not in steps]
        steps.update(fresh)
        pending += fresh
    if len(steps) > _MOST_STEPS:
        return None
    found = run_nodes(sorted(steps), walk.parameters.tensors.__getitem__)[index]
    return found.detach().cpu() if isinstance(found, torch.Tensor) else None


_MOST_STEPS = 64


def _read_by(index: fx.Node) -> str | None:
    """The buffer that an index is a copy of, None where it is computed."""
    while index.op == "call_function" and index.target in _COPIES:
        index = index.all_input_nodes[0]
    return str(index.target) if index.op == "get_attr" else None


_COPIES = (aten.lift_fresh_copy.default, aten.detach.default, aten.detach_.default, aten.alias.default)


def _indexed_by_data(walk: Walk, node: fx.Node, value: Value, used: list[int], indices: list[Any]) -> Result:
    if len(used) == 1:
        value = walk.flat(node, value, used[0])
    value = walk.blur(node, value, used, "indexed by data")
    for dim in used:
        walk.pin_operand(node, indices[dim], "used as an index")
    if used and used != list(range(used[0], used[-1] + 1)):
        return walk.refuse(node, "indexes axes that are apart")
    if any(walk.env[indices[dim]] and indices[dim].meta["val"].dtype in (torch.bool, torch.uint8) for dim in used):
        return walk.refuse(node, "the result's size depends on data")
    shape = walk.shape(node)
    count = len(shape) - (value.rank - len(used))
    looked_up = [Axis.plain(size) for size in shape[used[0] : used[0] + count]]
    axes = [*value.axes[: used[0]], *looked_up, *value.axes[used[-1] + 1 :]]
    return value.moved(axes, lambda tensor: tensor.reshape([axis.reduced for axis in axes]))


@register(aten.embedding)
@dataclass(frozen=True, eq=False)
class Embedding(OperatorCall):
    """Rows of a table looked up by data; its columns are channels."""

    weight: fx.Node
    indices: fx.Node
    modules: ClassVar = (nn.Embedding,)

    def relate(self, walk: Walk) -> Value:
        table = walk.blur(self.node, walk.value(self.weight), [0], "rows are looked up by data")
        walk.pin_operand(self.node, self.indices, "used as an index")
        axes = (*(Axis.plain(size) for size in walk.shape(self.node)[:-1]), table.axes[1])
        return table.moved(axes, lambda tensor: tensor.reshape([1] * (len(axes) - 1) + [-1]))

    @classmethod
    def module_sizes(cls, module: nn.Module) -> dict[str, Any]:
        rows, columns = module.weight.shape  # type: ignore[misc]
        return {"num_embeddings": rows, "embedding_dim": columns}


@register(aten.flip)
@dataclass(frozen=True, eq=False)
class Flip(OperatorCall):
    """Axes in reverse."""

    data: fx.Node
    dims: list[int]

    def relate(self, walk: Walk) -> Value:
        value = walk.value(self.data)
        turned = []
        for dim in (d % value.rank for d in self.dims):
            if value.axes[dim].carries:
                value, ids = walk.merged(self.node, value, dim)
                if ids is not None:
                    turned.append(dim)
                    value = replace(value, axes=value.replaced_axis(dim, Axis.of(ids[::-1].copy())))
        if not turned:
            return value.without_source()
        return value.moved(value.axes, lambda tensor: tensor.flip(turned))


@register(aten.roll)
@dataclass(frozen=True, eq=False)
class Roll(OperatorCall):
    """Axes turned by a number of indices."""

    data: fx.Node
    shifts: Any
    dims: Any

    def relate(self, walk: Walk) -> Result:
        shifts, dims = (list(a) if isinstance(a, list | tuple) else [a] for a in (self.shifts, self.dims))
        if not dims:
            return walk.refuse(self.node, "rolls over all axes")
        value = walk.value(self.data)
        wanted, turns = list(shifts), dict[int, int]()
        for i, dim in enumerate(d % value.rank for d in dims):
            if not value.axes[dim].carries:
                continue
            value, ids = walk.merged(self.node, value, dim)
            if ids is None:
                continue
            turn = shifts[i] % len(ids)
            turns[dim] = turn
            wanted[i] = Count(ids[len(ids) - turn :])
            value = replace(value, axes=value.replaced_axis(dim, Axis.of(np.roll(ids, turn))))
        if not turns:
            return value.without_source()
        walk.edits.append(SetArguments(self.node, {"shifts": wanted}))
        return value.moved(value.axes, lambda tensor: tensor.roll(list(turns.values()), list(turns)))


@register(aten.unfold)
@dataclass(frozen=True, eq=False)
class Windows(OperatorCall):
    """Windows of an axis as a new last axis."""

    data: fx.Node
    dimension: int

    def relate(self, walk: Walk) -> Value:
        value = walk.viewed(self.node, self.data)
        dim = self.dimension % value.rank
        value = walk.blur(self.node, value, [dim], "cut into windows")
        shape = walk.shape(self.node)
        axes = [*value.replaced_axis(dim, Axis.plain(shape[dim])), Axis.plain(shape[-1])]
        return value.moved(axes, lambda tensor: tensor.unsqueeze(-1))
