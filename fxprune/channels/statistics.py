"""Statistics over channels: a channel that is zero there may go, and is still counted.

Of `count` channels some stay; the others are exactly zero, whatever the input. Sums and norms keep their value. A mean
is scaled by the share that stays, a maximum is at least zero, and what has no such form gets its zeros back: operands
are padded with them, and the result is cut. So normalizations stay fused, in every precision. Those by the root mean
square, or by the mean itself as a global response norm, need no padding where their gain has one reader: with r the
share that stays,

    x / sqrt(sum(x²) / count + eps) * gain = x / sqrt(mean(x²) + eps / r) * (gain / sqrt(r)),
    x / (sum(x) / count + eps) * gain = x / (mean(x) + eps / r) * (gain / r).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from fxprune.channels.arguments import bound, set_argument
from fxprune.channels.edits import Edit, Kept
from fxprune.channels.ids import Mask, Vector
from fxprune.channels.readers import COUNTED, Reader
from fxprune.channels.shapes import resized
from fxprune.channels.used_weights import UsedWeights
from fxprune.channels.values import Value
from fxprune.channels.walk import Walk
from fxprune.graph.error_sites import working_on
from fxprune.graph.metadata import module_path

aten = torch.ops.aten


def counted(walk: Walk, node: fx.Node, zeros: Value, dim: int, ids: Vector, *, key: str, groups: int = 1) -> None:
    """Record that `node` needs the channels `ids` along an axis, except where `zeros` is known to be zero.

    Args:
        walk: of the node's graph.
        node: takes statistics.
        zeros: the value over which they are taken; its axis `dim` has these ids alone.
        key: the same for the same statistics in every graph.
        groups: consecutive channels that have statistics of their own; a group is needed where anything of it stays,
            where there are several.
    """
    _pin_padding(walk, node)
    walk.nonempty.append(ids)
    if not walk.facts:
        return
    columns = ids.reshape(groups, -1)
    zero: Mask = zeros.zeros.transpose(0, dim).reshape(len(ids), -1).all(1).numpy().reshape(columns.shape)
    rows = columns if groups > 1 else None
    used = UsedWeights.of(np.ones((groups, 1 if rows is None else columns.shape[1], columns.shape[1]), bool))
    constant = np.where(zero, 0.0, np.nan)
    walk.readers.append(
        Reader(node, rows, columns, used, soft=zero, constant=constant, key=("statistics", key), why=COUNTED)
    )


def _pin_padding(walk: Walk, node: fx.Node) -> None:
    """Zeros that stand for channels which went already are not taken out, only to be put back."""
    data = node.all_input_nodes[0]
    while data.target is aten.flatten.using_ints:
        data = data.all_input_nodes[0]
    if data.target is not aten.constant_pad_nd.default:
        return
    amounts: list[int] = bound(data)["pad"]
    value = walk.value(data)
    for at in range(0, len(amounts), 2):
        ids = value.axes[value.rank - 1 - at // 2].ids
        if amounts[at + 1] and ids is not None:
            walk.pin(node, ids[len(ids) - amounts[at + 1] :], "zeros that are counted")


# ---- edits


@dataclass(frozen=True, eq=False)
class Statistics(Edit):
    """What becomes of statistics.

    Attributes:
        node: takes them.
        ids: the channels that it takes them over.
    """

    node: fx.Node
    ids: Vector

    def counts(self, kept: Kept) -> tuple[int, int] | None:
        """How many channels are counted, and how many of them stay; None where that is the same."""
        stay = kept.count(self.ids)
        return None if stay == len(self.ids) else (len(self.ids), stay)


def _share(kept: Kept, ids: Vector) -> float:
    return kept.count(ids) / len(ids)


def _call(node: fx.Node, target: Any, args: tuple[Any, ...], value: Any) -> fx.Node:
    """A new call before a node, which belongs to the same module."""
    with node.graph.inserting_before(node):
        call = node.graph.call_function(target, args)
    call.meta = {**node.meta, "val": value}
    call.meta.pop("tensor_meta", None)
    return call


def _set_behind(node: fx.Node) -> fx.Node:
    """A copy of a call before it; the node itself is to become what follows."""
    with node.graph.inserting_before(node):
        copy = node.graph.create_node(node.op, node.target, node.args, dict(node.kwargs))
    copy.meta = dict(node.meta)
    return copy


def _become(node: fx.Node, target: Any, *args: Any) -> None:
    node.target, node.args, node.kwargs = target, args, {}


def _padding(rank: int, dim: int, zeros: int) -> list[int]:
    """The argument of a padding that adds zeros behind those of one axis."""
    return [0, 0] * (rank - 1 - dim) + [0, zeros]


def _padded(node: fx.Node, operand: fx.Node, dim: int, zeros: int) -> fx.Node:
    """An operand of `node` with zeros added along an axis; its recorded size is still the one before the removal."""
    before = operand.meta["val"]
    return _call(node, aten.constant_pad_nd.default, (operand, _padding(before.dim(), dim, zeros)), before)


@dataclass(frozen=True, eq=False)
class FirstResultAlone(Statistics):
    """A call that gives its statistics as well becomes one that gives what it normalizes, which alone is read.

    Attributes:
        node: takes the first result, and becomes the call; other edits change it after that.
        call: the one before.
        target: an operator that gives the first result alone.
        arguments: the arguments that it takes, by their names in `call`.
    """

    call: fx.Node
    target: Any
    arguments: Sequence[str]

    def apply(self, kept: Kept) -> None:
        if self.counts(kept) is None:
            return
        given = bound(self.call)
        _become(self.node, self.target, *(given[name] for name in self.arguments))

    def __str__(self) -> str:
        return f"{self.node.name}: {self.target}, without statistics"


@dataclass(frozen=True, eq=False)
class PadWithZeros(Statistics):
    """The zeros that went are put back before a call, and cut from its result.

    Attributes:
        operands: by name of an argument, the axis that holds the channels.
        cut: the axis of the result that holds them, None where none does.
    """

    operands: Mapping[str, int]
    cut: int | None = None

    def apply(self, kept: Kept) -> None:
        stay = kept.count(self.ids)
        zeros = len(self.ids) - stay
        if not zeros:
            return
        call = self.node if self.cut is None else _set_behind(self.node)
        given = bound(call)
        for name, dim in self.operands.items():
            set_argument(call, name, _padded(call, given[name], dim, zeros))
        if self.cut is not None:
            _become(self.node, aten.slice.Tensor, call, self.cut, 0, stay)

    def __str__(self) -> str:
        return f"{self.node.name}: the zeros that went of {len(self.ids)} put back"


@dataclass(frozen=True, eq=False)
class ScaledMean(Statistics):
    """A mean times the share of the channels that stays.

    Attributes:
        centre: where squares of distances from their mean are averaged, this mean: each channel that went is as far
            from it as zero is.
    """

    centre: fx.Node | None = None

    def apply(self, kept: Kept) -> None:
        share = _share(kept, self.ids)
        if share == 1:
            return
        mean = _set_behind(self.node)
        if self.centre is None:
            _become(self.node, aten.mul.Tensor, mean, share)
            return
        value = self.node.meta["val"]
        scaled = _call(self.node, aten.mul.Tensor, (mean, share), value)
        square = _call(self.node, aten.mul.Tensor, (self.centre, self.centre), value)
        rest = _call(self.node, aten.mul.Tensor, (square, 1 - share), value)
        _become(self.node, aten.add.Tensor, scaled, rest)

    def __str__(self) -> str:
        return f"{self.node.name}: over all of {len(self.ids)}"


@dataclass(frozen=True, eq=False)
class BoundedByZero(Statistics):
    """A maximum that is at least zero, or a minimum that is at most zero, where channels went.

    Attributes:
        results: the nodes that give it.
        maximum: whether it is one.
    """

    results: Sequence[fx.Node]
    maximum: bool

    def apply(self, kept: Kept) -> None:
        if _share(kept, self.ids) == 1:
            return
        clamp = aten.clamp_min.default if self.maximum else aten.clamp_max.default
        for node in self.results:
            _become(node, clamp, _set_behind(node), 0)

    def __str__(self) -> str:
        return f"{', '.join(node.name for node in self.results)}: zero among them"


@dataclass(frozen=True, eq=False)
class RootMeanSquare(Statistics):
    """A normalization by the root mean square or a mean; `rescale` is the form in which its gain takes the factor up.

    Attributes:
        node: the fused operator, or the mean (of the squares).
        gain: the name of its gain. eps_node, eps_name: where eps is an argument. eps: its value.
        otherwise: what is done where the gain cannot be changed.
        power: of the mean by which it divides.
    """

    gain: str
    eps_node: fx.Node
    eps_name: str
    eps: float
    otherwise: Edit
    power: float = 0.5

    def apply(self, kept: Kept) -> None:
        self.otherwise.apply(kept)

    def rescale(self, kept: Kept) -> Rescaled | None:
        """Change eps and what states the number of channels; None where all of them stay."""
        share = _share(kept, self.ids)
        if share == 1:
            return None
        set_argument(self.eps_node, self.eps_name, self.eps / share)
        if "normalized_shape" in bound(self.node):
            set_argument(self.node, "normalized_shape", [kept.count(self.ids)])
        return Rescaled(share**-self.power, (self.eps, self.eps / share))

    def __str__(self) -> str:
        return f"{self.node.name}: over all of {len(self.ids)}, by its gain and eps"


@dataclass(frozen=True, eq=False)
class GroupStatistics(Statistics):
    """Groups that went leave the count of groups; of those that stay, zeros that went are put back.

    Attributes:
        ids: [groups, channels of each].
        operands: as for `PadWithZeros`.
    """

    operands: Mapping[str, int]

    def counts(self, kept: Kept) -> tuple[int, int] | None:
        alive = kept.alive(self.ids)
        left = alive[alive.any(1)]
        return None if left.all() else (left.size, int(left.sum()))

    def apply(self, kept: Kept) -> None:
        alive = kept.alive(self.ids)
        if alive.all():
            return
        counts = alive.sum(1)[alive.any(1)]
        groups, width, stay = len(counts), self.ids.shape[1], int(counts[0])
        set_argument(self.node, "num_groups", groups)
        if stay == width:
            return
        assert (counts == stay).all(), self.node
        call = _set_behind(self.node)
        given = bound(call)
        for name, dim in self.operands.items():
            operand = given[name]
            shape = list(operand.meta["val"].shape)
            split = [*shape[:dim], groups, stay, *shape[dim + 1 :]]
            value = resized(operand.meta["val"], [*shape[:dim], groups * width, *shape[dim + 1 :]])
            folded = _call(call, aten.unflatten.int, (operand, dim, [groups, stay]), _like(value, split))
            split[dim + 1] = width
            zeros = _padding(len(split), dim + 1, width - stay)
            padded = _call(call, aten.constant_pad_nd.default, (folded, zeros), _like(value, split))
            flat = _call(call, aten.flatten.using_ints, (padded, dim, dim + 1), value)
            set_argument(call, name, flat)
        before = call.meta["val"]
        shape = list(before.shape)
        call.meta["val"] = resized(before, [shape[0], groups * width, *shape[2:]])
        split = [shape[0], groups, width, *shape[2:]]
        folded = _call(self.node, aten.unflatten.int, (call, 1, [groups, width]), _like(before, split))
        split[2] = stay
        cut = _call(self.node, aten.slice.Tensor, (folded, 2, 0, stay), _like(before, split))
        _become(self.node, aten.flatten.using_ints, cut, 1, 2)

    def __str__(self) -> str:
        return f"{self.node.name}: num_groups = groups kept of {len(self.ids)}"


def _like(value: Any, shape: Sequence[Any]) -> Any:
    """A fake tensor of another rank."""
    return value.new_empty(shape)


def rescalable(walks: Iterable[Walk]) -> set[str]:
    """The gains that one normalization alone reads in each graph that has it, in a precision that holds the factor."""
    walks = list(walks)
    found = {edit.gain for walk in walks for edit in walk.edits if isinstance(edit, RootMeanSquare)}
    for walk in walks:
        own = {edit.gain for edit in walk.edits if isinstance(edit, RootMeanSquare)}
        found -= {name for name in walk.uses if name in found and not (name in own and walk.is_alone(name))}
    return {name for name in found if walks[0].parameters.tensors[name].dtype in (torch.float32, torch.float64)}


@dataclass(frozen=True)
class Rescaled:
    """What a normalization by the root mean square takes up.

    Attributes:
        factor: of its gain.
        eps: before and after.
    """

    factor: float
    eps: tuple[float, float]


@dataclass(frozen=True)
class Counted:
    """The statistics over channels of which some went.

    Attributes:
        rescaled: by the name of a gain.
        counting: by module, or node outside of modules, how many channels are counted and how many of them there are.
    """

    rescaled: dict[str, Rescaled]
    counting: dict[str, tuple[int, int]]


def apply_edits(walks: Iterable[Walk], kept: Kept) -> Counted:
    """Carry out what removal changes in the graphs."""
    walks = list(walks)
    names, found = rescalable(walks), Counted({}, {})
    for edit in (edit for walk in walks for edit in walk.edits):
        with working_on(edit.node):
            _apply(edit, kept, names, found)
    return found


def _apply(edit: Edit, kept: Kept, rescaled_names: Collection[str], found: Counted) -> None:
    if isinstance(edit, RootMeanSquare) and edit.gain in rescaled_names:
        rescaled = edit.rescale(kept)
        if rescaled is not None:
            found.rescaled[edit.gain] = rescaled
        return
    if isinstance(edit, Statistics) and (counts := edit.counts(kept)) is not None:
        found.counting[module_path(edit.node) or edit.node.name] = counts
    edit.apply(kept)
