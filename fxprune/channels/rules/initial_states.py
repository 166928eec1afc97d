"""The states that recurrent layers start with: zeros made by the graph, states of other calls, or what is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
import torch
from torch import fx

from fxprune.channels.arguments import bound
from fxprune.channels.edits import Kept, Pending
from fxprune.channels.ids import Mask, Vector
from fxprune.channels.shapes import resized
from fxprune.channels.values import Stack, Value
from fxprune.channels.walk import Walk
from fxprune.graph.buffers import hold_buffer

aten = torch.ops.aten
_ZEROS = (aten.zeros, aten.new_zeros, aten.zeros_like)
_FILLS = (aten.full, aten.new_full, aten.full_like)
# what gives entries of its operand alone
_MOVES = (
    aten.expand, aten.view, aten.reshape, aten.unsqueeze, aten.squeeze, aten.select, aten.slice, aten.narrow,
    aten.transpose, aten.permute, aten.clone, aten.contiguous, aten.detach, aten.alias, aten.to, aten._to_copy,
    aten.lift_fresh_copy, aten.repeat,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class State:
    """What one layer in one direction starts with.

    Attributes:
        ids: of its entries, None where they carry none.
        zeros: which entries are zero; all False where constants are not followed.
    """

    ids: Vector | None
    zeros: Mask

    def tie(self, walk: Walk, units: Vector) -> None:
        """Make its entries those of `units`, where it has channels."""
        if self.ids is not None:
            walk.ids.unify(self.ids, units)


@dataclass(frozen=True, eq=False)
class Narrowed(Pending):
    """As many entries of a state of zeros as units stay."""

    state: fx.Node
    units: Vector

    def resolve(self, kept: Kept, node: fx.Node) -> fx.Node:
        count = kept.count(self.units)
        if count == len(self.units):
            return self.state
        value = self.state.meta["val"]
        with node.graph.inserting_before(node):
            taken = node.graph.call_function(aten.slice.Tensor, (self.state, value.dim() - 1, 0, count))
        taken.meta["val"] = resized(value, [*value.shape[:-1], count])
        return taken

    def __str__(self) -> str:
        return f"{self.state.name} cut to what is kept of {len(self.units)}"


@dataclass(frozen=True, eq=False)
class Picked(Pending):
    """The entries of a given state that belong to the units that stay, those of each row of its first axis.

    Attributes:
        state: what is given; it keeps its size.
        rows: the units of each row; of a single one, those of all.
    """

    state: fx.Node
    rows: Sequence[Vector]

    def resolve(self, kept: Kept, node: fx.Node) -> fx.Node:
        indices = [np.flatnonzero(kept.alive(units)) for units in self.rows]
        if len(indices[0]) == len(self.rows[0]):
            return self.state
        if all(np.array_equal(index, indices[0]) for index in indices):
            return _picked(self.state, indices[0], node)
        graph, value = node.graph, self.state.meta["val"]
        parts = []
        for row, index in enumerate(indices):
            with graph.inserting_before(node):
                own = graph.call_function(aten.slice.Tensor, (self.state, 0, row, row + 1))
            own.meta["val"] = resized(value, [1, *value.shape[1:]])
            parts.append(_picked(own, index, node))
        with graph.inserting_before(node):
            joined = graph.call_function(aten.cat.default, (parts, 0))
        joined.meta["val"] = resized(value, [*value.shape[:-1], len(indices[0])])
        return joined

    def __str__(self) -> str:
        return f"{self.state.name} at what is kept of {len(self.rows[0])}"


def _picked(state: fx.Node, index: Vector, node: fx.Node) -> fx.Node:
    """Entries of the last axis of a state, for a call."""
    value = state.meta["val"]
    with node.graph.inserting_before(node):
        name = hold_buffer(node, "kept_units", torch.from_numpy(index).to(value.device), shared=True)
        stored = node.graph.get_attr(name)
        picked = node.graph.call_function(aten.index_select.default, (state, value.dim() - 1, stored))
    stored.meta["val"] = value.fake_mode.from_tensor(torch.from_numpy(index))
    picked.meta["val"] = resized(value, [*value.shape[:-1], len(index)])
    return picked


class Cut(Enum):
    """How a state at the start gets the size of the units that stay."""

    FOLLOWS = "its entries are the units'"
    NARROWED = "zeros that others read too: each call takes as many as it needs"
    PICKED = "given: a call picks the entries that it needs"


@dataclass(frozen=True, eq=False)
class InitialStates:
    """Those of all layers and directions of a call, one operand.

    Attributes:
        operand: the node.
        states: by layer and direction.
        cut: how removal changes it.
    """

    operand: fx.Node
    states: list[State]
    cut: Cut = Cut.FOLLOWS

    @classmethod
    def of(cls, walk: Walk, node: fx.Node, operand: fx.Node, rows: int) -> InitialStates:
        """From the operand [units] behind a batch, and behind `rows` layers and directions where these are several."""
        width = int(walk.shape(operand)[-1])
        found = walk.env.get(operand)
        if isinstance(found, Stack) and len(found.parts) == rows:
            return cls(operand, [_state(walk, part, width) for part in found.parts])
        value = walk.value(operand)
        value = walk.blur(node, value, range(value.rank - 1), "layers, directions or samples of an initial state")
        value = walk.flat(node, value, value.rank - 1)
        first = _state(walk, value, width)
        chain = zeros_behind(operand)
        if chain is None or any(map(walk.is_written, chain)):
            return cls(operand, [first] * rows, Cut.PICKED if first.ids is None else Cut.FOLLOWS)
        free = State(None, np.full(width, walk.facts))
        if any(len(link.users) > 1 for link in chain) or first.ids is None:
            if first.ids is not None:
                walk.pin(node, first.ids, "zeros that several layers start with")
            return cls(operand, [free] * rows, Cut.NARROWED)
        return cls(operand, [replace(free, ids=first.ids), *[free] * (rows - 1)])

    def edited(self, units: Sequence[Vector]) -> fx.Node | Pending:
        """The operand as removal has it, by the units of each layer and direction."""
        if self.cut is Cut.NARROWED:
            return Narrowed(self.operand, units[0])
        return Picked(self.operand, units) if self.cut is Cut.PICKED else self.operand


def _state(walk: Walk, value: Value, width: int) -> State:
    zeros = value.zeros.reshape(-1, value.zeros.shape[-1]).all(0) if walk.facts else torch.zeros(1, dtype=torch.bool)
    return State(value.axes[-1].ids, zeros.expand(width).numpy())


def zeros_behind(node: fx.Node) -> list[fx.Node] | None:
    """The nodes from one back to the zeros that it takes its entries from; None where it is anything else."""
    chain: list[fx.Node] = []
    while node.op == "call_function":
        chain.append(node)
        packet = getattr(node.target, "overloadpacket", None)
        if packet in _ZEROS or (packet in _FILLS and bound(node)["fill_value"] == 0):
            return chain
        if packet not in _MOVES:
            return None
        node = node.args[0]  # type: ignore[assignment]
    return None
