"""The states that recurrent layers start with: zeros made by the graph, states of other calls, or what is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from fxprune.channels.arguments import bound
from fxprune.channels.edits import Kept, Pending
from fxprune.channels.ids import Mask, Vector
from fxprune.channels.shapes import resized
from fxprune.channels.values import Stack, Value
from fxprune.channels.walk import Walk

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
        free: whether it takes the size of the units, whichever stay.
    """

    ids: Vector | None
    zeros: Mask
    free: bool

    def tie(self, walk: Walk, node: fx.Node, units: Vector) -> None:
        """Make its entries those of `units`."""
        if self.ids is not None:
            walk.ids.unify(self.ids, units)
        elif not self.free:
            walk.pin(node, units, "units whose initial state is given")


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
class InitialStates:
    """Those of all layers and directions of a call, one operand.

    Attributes:
        states: by layer and direction.
        shared: whether the operand is zeros that others read too, so that each call must cut it for itself.
    """

    states: list[State]
    shared: bool

    @classmethod
    def of(cls, walk: Walk, node: fx.Node, operand: fx.Node, rows: int) -> InitialStates:
        """From the operand [units] behind a batch, and behind `rows` layers and directions where it is stacked."""
        width = int(walk.shape(operand)[-1])
        found = walk.env.get(operand)
        if isinstance(found, Stack) and len(found.parts) == rows:
            return cls([_state(walk, part, width) for part in found.parts], False)
        value = walk.value(operand)
        value = walk.blur(node, value, range(value.rank - 1), "layers, directions or samples of an initial state")
        value = walk.flat(node, value, value.rank - 1)
        first = _state(walk, value, width)
        chain = zeros_behind(operand)
        if chain is None or any(map(walk.is_written, chain)):
            return cls([first] * rows, False)
        zeros = np.full(width, walk.facts)
        if any(len(link.users) > 1 for link in chain):
            if first.ids is not None:
                walk.pin(node, first.ids, "zeros that several layers start with")
            return cls([State(None, zeros, True)] * rows, True)
        rest = State(None, zeros, True)
        return cls([State(first.ids, zeros, first.ids is None and width == 1), *[rest] * (rows - 1)], False)


def _state(walk: Walk, value: Value, width: int) -> State:
    zeros = value.zeros.reshape(-1, value.zeros.shape[-1]).all(0) if walk.facts else torch.zeros(1, dtype=torch.bool)
    return State(value.axes[-1].ids, zeros.expand(width).numpy(), width == 1)


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


def cut_to_units(operand: fx.Node, states: InitialStates, units: Sequence[Vector]) -> object:
    """The operand as an edit has it: cut where others read it too."""
    return Narrowed(operand, units[0]) if states.shared else operand
