"""What removal changes in a graph, as data: arguments that depend on which ids stay.

An edit names a node and the new values of some of its arguments. A value may hold counts of ids; they become numbers
once it is known which ids stay.
"""

from __future__ import annotations

import abc
import itertools
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from fxprune.channels.arguments import bound, set_argument
from fxprune.channels.axes import Axis
from fxprune.channels.ids import Classes, Mask, Vector
from fxprune.graph.buffers import hold_buffer


class Kept:
    """Which ids stay."""

    def __init__(self, classes: Classes, alive: Mask) -> None:
        self._classes, self._alive = classes, alive

    def alive(self, ids: Vector) -> Mask:
        """Which of these ids stay, in their shape."""
        return self._alive[self._classes.of[ids]]

    def count(self, ids: Vector) -> int:
        """How many of these ids stay; of rows [n, m], how many in which any stays."""
        alive = self.alive(ids)
        return int((alive if alive.ndim == 1 else alive.any(1)).sum())

    def all(self) -> bool:
        """Whether nothing goes."""
        return bool(self._alive.all())

    def ratio(self, axis: Axis) -> tuple[int, int]:
        """How many indices the factors with ids had, and how many stay."""
        before = after = 1
        for factor in axis:
            if factor.ids is not None:
                before, after = before * len(factor.ids), after * self.count(factor.ids)
        return before, after

    def resized(self, size: Any, axis: Axis) -> Any:
        """The size of an axis after removal, from its size before."""
        before, after = self.ratio(axis)
        return size if before == after else size // before * after


class Pending(abc.ABC):
    """An argument that is known once it is known which ids stay."""

    @abc.abstractmethod
    def resolve(self, kept: Kept, node: fx.Node) -> Any:
        """The argument; nodes that compute it are inserted before `node`."""


@dataclass(frozen=True, eq=False)
class Count(Pending):
    """How many of these ids stay; of groups [n, ids of each], how many in which any stays."""

    ids: Vector

    def resolve(self, kept: Kept, node: fx.Node) -> int:
        return kept.count(self.ids)

    def __str__(self) -> str:
        return f"kept of {len(self.ids)}" + (" groups" if self.ids.ndim > 1 else "")


@dataclass(frozen=True, eq=False)
class PartSizes(Pending):
    """How many of each part's ids stay, without the parts of which none does; or the places where the parts end."""

    parts: list[Vector]
    as_ends: bool = False

    def resolve(self, kept: Kept, node: fx.Node) -> list[int]:
        counts = [count for part in self.parts if (count := kept.count(part))]
        return list(itertools.accumulate(counts))[:-1] if self.as_ends else counts

    def __str__(self) -> str:
        return f"kept of parts of {', '.join(str(len(part)) for part in self.parts)}"


@dataclass(frozen=True, eq=False)
class Extent(Pending):
    """The size of an axis, given as a number, as -1, or computed by a node."""

    size: Any
    axis: Axis

    def resolve(self, kept: Kept, node: fx.Node) -> Any:
        before, after = kept.ratio(self.axis)
        if before == after or (isinstance(self.size, int) and self.size < 0):
            return self.size
        if isinstance(self.size, int):
            return self.size // before * after
        with node.graph.inserting_before(node):
            scaled = node.graph.call_function(operator.mul, (self.size, after))
            scaled.meta["val"] = self.size.meta["val"] * after
            result = node.graph.call_function(operator.floordiv, (scaled, before))
            result.meta["val"] = scaled.meta["val"] // before
        return result

    def __str__(self) -> str:
        return f"{self.size} scaled to what is kept"


class Edit(abc.ABC):
    """One change of a graph that removal needs; `node` is the call that it changes."""

    node: fx.Node

    @abc.abstractmethod
    def apply(self, kept: Kept) -> None: ...


@dataclass(frozen=True, eq=False)
class SetArguments(Edit):
    """New values for arguments of a node by name; every leaf may be a `Pending`."""

    node: fx.Node
    arguments: Mapping[str, Any]

    def apply(self, kept: Kept) -> None:
        for name, value in self.arguments.items():
            set_argument(self.node, name, _resolved(value, kept, self.node))

    def __str__(self) -> str:
        return f"{self.node.name}: " + ", ".join(f"{name} = {_shown(v)}" for name, v in self.arguments.items())


@dataclass(frozen=True, eq=False)
class ReplaceCall(Edit):
    """Another operator with other arguments in the place of a node's."""

    node: fx.Node
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def apply(self, kept: Kept) -> None:
        self.node.target = self.target
        self.node.args = tuple(_resolved(self.args, kept, self.node))
        self.node.kwargs = {name: _resolved(value, kept, self.node) for name, value in self.kwargs.items()}

    def __str__(self) -> str:
        return f"{self.node.name}: {self.target}{_shown(self.args)}"


@dataclass(frozen=True, eq=False)
class TakeIndices(Edit):
    """The indices `taken` of an axis: a slice where what stays of them is evenly spaced, else by an index that is held.

    Attributes:
        node: a call of `aten.slice`.
        data, dim: what it takes from.
        ids: of the axis.
    """

    node: fx.Node
    data: fx.Node
    dim: int
    ids: Vector
    taken: Vector

    def apply(self, kept: Kept) -> None:
        alive = kept.alive(self.ids)
        places = _places(alive, self.taken)
        steps = np.unique(np.diff(places)).tolist() or [1]
        if len(steps) == 1:
            wanted = {"start": int(places[0]), "end": int(places[-1]) + 1, "step": steps[0]}
            for name, value in wanted.items():
                set_argument(self.node, name, value)
            return
        _select(self.node, self.data, self.dim, places)

    def __str__(self) -> str:
        return f"{self.node.name}: what stays of {len(self.taken)} of {len(self.ids)}"


@dataclass(frozen=True, eq=False)
class HoldIndex(Edit):
    """The indices `taken` of an axis, some of whose channels go, by an index that is held.

    Attributes:
        node: a call that takes them by an index that is computed, or that others read as well.
        data, dim: what it takes from.
        ids: of the axis.
    """

    node: fx.Node
    data: fx.Node
    dim: int
    ids: Vector
    taken: Vector

    def apply(self, kept: Kept) -> None:
        alive = kept.alive(self.ids)
        if alive.all():
            return
        _select(self.node, self.data, self.dim, _places(alive, self.taken))

    def __str__(self) -> str:
        return f"{self.node.name}: what stays of {len(self.taken)} of {len(self.ids)}, by a held index"


def _places(alive: Mask, taken: Vector) -> Vector:
    """Where, among the channels that stay, those are that are taken and stay."""
    places: Vector = (np.cumsum(alive) - 1)[taken[alive[taken]]]
    return places


def _select(node: fx.Node, data: fx.Node, dim: int, places: Vector) -> None:
    """Let a call take places of an axis by an index that is held."""
    index = _held(node, torch.from_numpy(places))
    node.target = torch.ops.aten.index_select.default
    node.args, node.kwargs = (data, dim, index), {}


def _held(node: fx.Node, index: Tensor) -> fx.Node:
    """The read, before `node`, of a buffer that holds an index for it; graphs share what is equal."""
    value = node.meta["val"]
    name = hold_buffer(node, f"index_of_{node.name}", index.to(value.device), shared=True)
    with node.graph.inserting_before(node):
        read = node.graph.get_attr(name)
    with value.fake_mode:
        read.meta["val"] = torch.empty(len(index), dtype=torch.int64, device=value.device)
    return read


@dataclass(frozen=True, eq=False)
class DropItems(Edit):
    """Results of a call of which nothing stays, and that nothing reads, dropped; the others keep their order.

    Attributes:
        node: the call, whose results are read by `operator.getitem`.
        parts: the ids of each result.
        results: what is known of each, shortened with them.
    """

    node: fx.Node
    parts: list[Vector]
    results: list[Any]

    def apply(self, kept: Kept) -> None:
        stays = [kept.count(part) > 0 for part in self.parts]
        if all(stays):
            return
        place = (np.cumsum(stays) - 1).tolist()
        for user in list(self.node.users):
            index = int(user.args[1])  # type: ignore[arg-type]
            if stays[index]:
                user.update_arg(1, place[index])
            else:
                user.graph.erase_node(user)
        recorded = self.node.meta["val"]
        self.node.meta["val"] = type(recorded)(itertools.compress(recorded, stays))
        self.results[:] = itertools.compress(self.results, stays)


@dataclass(frozen=True, eq=False)
class LeaveStacks(Edit):
    """A channel that is taken alone, and that only stacks read, leaves these where it goes.

    Attributes:
        node: is the channel, without its axis.
        ids: its id, a vector of one.
    """

    node: fx.Node
    ids: Vector

    def apply(self, kept: Kept) -> None:
        if kept.count(self.ids):
            return
        for stack in list(self.node.users):
            set_argument(stack, "tensors", [each for each in bound(stack)["tensors"] if each is not self.node])

    def __str__(self) -> str:
        return f"{self.node.name}: leaves what stacks it"


@dataclass(frozen=True, eq=False)
class LayOut(Edit):
    """A call that asks for strides which removal may change gets a copy without gaps."""

    node: fx.Node

    def apply(self, kept: Kept) -> None:
        if kept.all():
            return
        (data,) = self.node.all_input_nodes
        with self.node.graph.inserting_before(self.node):
            copied = self.node.graph.call_function(torch.ops.aten.contiguous.default, (data,))
        copied.meta["val"] = data.meta["val"].contiguous()
        self.node.replace_input_with(data, copied)

    def __str__(self) -> str:
        return f"{self.node.name}: reads a copy without gaps"


@dataclass(frozen=True, eq=False)
class Reindex:
    """A stored index into an axis whose indices shift: `order` [n] into `ids`, held by the buffer `name`."""

    name: str
    ids: Vector
    order: Tensor


def _resolved(value: Any, kept: Kept, node: fx.Node) -> Any:
    return pytree.tree_map_only(Pending, lambda pending: pending.resolve(kept, node), value)


def _shown(value: Any) -> Any:
    return pytree.tree_map_only(Pending, str, value)
