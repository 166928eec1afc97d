"""Channel groups: what must be masked together so that it can be removed, and what removing it saves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
import torch

from fxprune.channels.blocks import Blocks, find_blocks
from fxprune.channels.coupling import coupling
from fxprune.channels.ids import Mask, Vector
from fxprune.channels.liveness import Consistency
from fxprune.channels.parameter_axes import ChannelAxes
from fxprune.channels.relation import Relation, numbered, positions_of
from fxprune.channels.solver import Costs
from fxprune.channels.totals import Term, Total, contraction_totals
from fxprune.channels.units import Place, UnitTable
from fxprune.graph.batch import Batch
from fxprune.graph.names import parameter_count
from fxprune.graph.text import describe
from fxprune.graph.traced import TracedModule
from fxprune.reports import Readable, counted, plain

Scores = Costs


class Kind(StrEnum):
    """What the units of a group are; the strings are `ChannelGroup.kind`."""

    CHANNEL = "channel"
    HEAD = "attention head"
    KEY_VALUE_GROUP = "key-value group"
    HEAD_CHANNEL = "head channel"
    MLP_UNIT = "MLP unit"
    CONVOLUTION_GROUP = "conv group"
    WIDTH = "width"
    BLOCK = "block"  # of no group: whole modules of a list


_KINDS = {Place.OUTER: Kind.HEAD, Place.INNER: Kind.HEAD_CHANNEL, Place.OUTERMOST: Kind.KEY_VALUE_GROUP}
WHOLE_KINDS = (Kind.HEAD, Kind.KEY_VALUE_GROUP, Kind.CONVOLUTION_GROUP)  # whose units hold many channels


@dataclass(frozen=True)
class Member:
    """One axis of a parameter that a group cuts.

    Attributes:
        parameter, axis: which.
        role: "writer" (rows of a weight, biases, gains) or "reader" (columns, which a contraction sums over).
    """

    parameter: str
    axis: int
    role: str

    def __str__(self) -> str:
        return f"{self.parameter}[{self.axis}]{'' if self.role == 'writer' else ' read'}"


@dataclass(frozen=True, repr=False)
class ChannelGroup(Readable):
    """Channels that are alike; each of its units is a set of slices that is masked, and removed, as a whole.

    Attributes:
        name: the first weight that writes it.
        kind: "channel", "attention head", "key-value group", "head channel", "MLP unit", "conv group", or "width":
            what is normalized together, such as the hidden size of a transformer.
        size: number of units.
        members: the parameter axes involved, writers first.
        macs, parameters: multiply-accumulates (of one sample) and parameters that one unit saves.
        traffic: elements that convolutions and linear layers then neither read nor write (for one sample).
        reason: why it may not be pruned, None where it may.
        sample: what is counted, "one sample of 3x224x224".
        aligned: whether a convolution has these channels.
        units: the classes that name its units (`fxprune.channels.units`), ascending.
        cells, share, parts: for each unit its cell, the cell's share, and what of that goes with each part of a step,
            [units, parts]; block: that of all (`fxprune.channels.blocks`).
        blocked: whether a convolution reads them, or works on each: onnxruntime then computes in blocks, if 4 divides
            their number.
    """

    name: str
    kind: str
    size: int
    members: tuple[Member, ...]
    macs: int
    parameters: int
    traffic: int
    reason: str | None
    aligned: bool
    units: Vector = field(repr=False, compare=False)
    cells: Vector = field(repr=False, compare=False)
    share: Vector = field(repr=False, compare=False)
    parts: Vector = field(repr=False, compare=False)
    block: int = field(repr=False, compare=False)
    sample: str = field(default="", repr=False, compare=False)
    blocked: bool = field(default=False, repr=False, compare=False)

    def __str__(self) -> str:
        what = f"{self.name}: {self.size} of the kind {self.kind}"
        if self.reason:
            return f"{what}, which stay: {self.reason}"
        return f"{what}, each of {self.macs:,} MACs and {counted(self.parameters, 'parameter')}"

    def table(self) -> str:
        """The group with its members."""
        return "\n".join([str(self), *(f"  {member}" for member in self.members)])

    def to_dict(self) -> dict[str, Any]:
        """The group and its members in JSON's types, without the classes of its units."""
        hidden = ("units", "cells", "share", "parts", "block")
        found = {name: plain(value) for name, value in vars(self).items() if name not in hidden}
        return found | {"traffic_elements": found.pop("traffic")}


class ChannelGroups(Readable, list[ChannelGroup]):
    """What `channel_groups` found: those that may be pruned, then those that may not.

    Example:
        >>> groups = fxprune.channel_groups(traced)
        >>> print(groups)
        2 groups with 26 units; 2 of the groups may be pruned, with 26 units
    """

    def __str__(self) -> str:
        free = [group for group in self if group.reason is None]
        units, usable = (sum(group.size for group in groups) for groups in (self, free))
        lines = [f"{counted(len(self), 'group')} with {counted(units, 'unit')}"]
        lines[0] += f"; {len(free)} of the groups may be pruned, with {counted(usable, 'unit')}" if self else ""
        kinds = Counter(group.kind for group in self)
        lines += [", ".join(f"{count} of the kind {kind}" for kind, count in kinds.items())] if len(kinds) > 1 else []
        return "\n".join(lines)

    def table(self) -> str:
        """The groups, one a line: what their units save, and their members or why they stay."""
        return table(self).rstrip("\n")

    def to_dict(self) -> dict[str, Any]:
        """The groups in order; multiply-adds are for one of `sample`."""
        samples = dict.fromkeys(group.sample for group in self)
        return {"sample": next(iter(samples), ""), "groups": [group.to_dict() for group in self]}


class Grouping:
    """The groups of a module without reparametrizations, and what a choice of units leaves of it.

    Attributes:
        plain: the module.
        found: its coupling.
        groups: those that may be pruned first, then those that may not.
        axes: the parameter axes that carry channels.
        units: which classes die with which unit.
        consistency: what every choice keeps.
        macs, parameters, traffic: what is left, by the classes that are alive; `dense` has all of the whole model.
        sample: what MACs and traffic are counted for, "one sample of 3x224x224".

    Args:
        plain: the module.
        alike: classes [rows, n] of which every choice leaves each row equally many.
        staying: classes that no choice removes, and why.
        for_class: whether the class of the model is to take the statistics over the channels that are left.
    """

    def __init__(
        self,
        plain: TracedModule,
        alike: Sequence[Vector] = (),
        staying: Sequence[tuple[Vector, str]] = (),
        *,
        for_class: bool = False,
    ) -> None:
        self.plain, self.found = plain, coupling(plain, for_class=for_class)
        classes = self.found.classes
        reached = {n for g in plain.graphs.values() for n in g.nodes}
        self.consistency = Consistency.of(self.found, reached, alike=alike)
        self._tensors: Mapping[str, torch.nn.Parameter] = dict(plain.named_parameters(remove_duplicate=False))
        self.axes = ChannelAxes.of(self.found, self._tensors)
        fixed: Mask = classes.pinned.copy()
        self._staying = staying
        for stay, _ in staying:
            fixed[stay] = True
        classes.close(fixed)
        self.units = UnitTable(classes, self.consistency.balances, fixed)
        self._normalized: Mask = np.zeros(classes.count, bool)
        for walk in self.found.walks.values():
            for ids in walk.normalized:
                self._normalized[self.found.of(ids)] = True
        self.macs, self.traffic = contraction_totals(self.found)
        self.sample = str(Batch.of(plain.graphs["eval"]))
        self.parameters = self._parameters()
        everything = np.ones(classes.count, bool)
        self._read = self.macs(everything), self.parameters(everything), self.traffic(everything)
        self.dense = self._read[0], parameter_count(plain), self._read[2]
        self.groups = self._groups()

    def repair(
        self,
        gone: Vector | None = None,
        ranks: Sequence[tuple[ChannelGroup, Scores]] = (),
        align: int | str = 1,
        decided: Collection[tuple[str, int]] = (),
    ) -> Repair:
        """What makes choices consistent.

        Args:
            gone: units that are masked whatever is chosen.
            ranks: groups with scores of their units; where a choice is left, those with high scores stay.
            align: as in `finalize`.
            decided: axes whose counts it does not round.
        """
        costs = np.zeros(self.found.classes.count)
        for group, scores in ranks:
            costs[group.units] = 1 - np.argsort(np.argsort(scores, kind="stable")) / len(scores)
        gone = np.zeros(0, np.int64) if gone is None else gone
        nothing = np.zeros(len(costs), bool)
        return Repair(self, self.consistency.aligned(align, decided), gone, costs, nothing, nothing)

    def _parameters(self) -> Total:
        of = self.found.of
        balances = {b.weight: b for walk in self.found.walks.values() for b in walk.balances}
        within = {name: (of(b.inputs), of(b.outputs)) for name, b in balances.items()}
        gets = (node for graph in self.plain.graphs.values() for node in graph.find_nodes(op="get_attr"))
        reads = {str(node.target) for node in gets if node.users}
        read: dict[int, str] = {}  # what nothing reads will go; tied ones count once
        for name, parameter in self._tensors.items():
            if name in reads:
                read.setdefault(id(parameter), name)
        vectors: dict[str, list[Vector]] = {name: [] for name in read.values()}
        for axis in self.axes:
            if axis.parameter in vectors:
                vectors[axis.parameter].append(self.axes.vector(axis))
        terms = [Term(float(self._tensors[name].numel()), own, within.get(name)) for name, own in vectors.items()]
        return Total(terms, self.found.classes.count)

    def _groups(self) -> list[ChannelGroup]:
        """Units are one group that the same weights write, that stand in the same place and die with as much."""
        units = self.units
        cuts = units.cuts(self.axes.vectors)
        writers = self._writers(cuts)
        usable = units.named & (writers > 0)
        if not usable.any():
            return []
        sides = [*self.consistency.balances, *((rows, rows) for rows in self.consistency.equal)]
        blocks = find_blocks(units, sides, usable & ~units.fixed)
        needed = units.alone_in(self.consistency.axes)
        names = np.flatnonzero(usable)
        alike = (writers, units.place, units.sizes(), blocks.block, units.fixed, needed & ~units.fixed)
        numbers = numbered(*(column[names] for column in alike))
        found = [self._group(names[at], cuts, blocks, needed) for at in positions_of(numbers).values()]
        order: dict[str, int] = {}
        for number, axis in enumerate(self.axes):
            order.setdefault(axis.parameter, number)
        found.sort(key=lambda group: (order[group.name], group.kind))
        return self._checked(found, blocks)

    def _writers(self, cuts: Relation) -> Vector:
        """By unit a number, the same where the same weights write it; 0 where none does."""
        written = np.zeros(len(self.axes.vectors), bool)
        for axis in self.axes:
            written[axis.vector] |= axis.role == "writer" and self._tensors[axis.parameter].dim() > 1
        counted = written[cuts.rights]
        return Relation(cuts.lefts[counted], cuts.rights[counted], len(cuts), len(written)).signatures()

    def _group(self, units: Vector, cuts: Relation, blocks: Blocks, needed: Mask) -> ChannelGroup:
        members = self._members(np.unique(cuts.of(units)))
        dying = self.units.dying.row(int(units[0]))
        normalized = bool(self._normalized[dying].any())
        totals = (self.macs, self.parameters, self.traffic)
        macs, parameters, traffic = (
            whole - total.without(dying) for whole, total in zip(self._read, totals, strict=True)
        )
        return ChannelGroup(
            members[0].parameter,
            (Kind.WIDTH if normalized else self._kind(Place(int(self.units.place[units[0]])), members)).value,
            len(units),
            members,
            macs,
            parameters,
            traffic,
            self._reason(units, bool(needed[units[0]])),
            self._spatial(members),
            units,
            blocks.cell[units],
            blocks.share[units],
            blocks.parts_of(units),
            int(blocks.block[units[0]]),
            self.sample,
            any(self._is_blocked(member) for member in members),
        )

    def _members(self, vectors: Vector) -> tuple[Member, ...]:
        """The axes of class vectors: writers before readers, weights before biases and gains."""
        numbers = sorted(number for vector in vectors.tolist() for number in self.axes.by_vector[vector])
        axes = [self.axes.axes[number] for number in numbers]
        members = [Member(axis.parameter, axis.axis, axis.role) for axis in axes]
        return tuple(sorted(members, key=lambda m: (m.role == "reader", self._tensors[m.parameter].dim() < 2)))

    def _spatial(self, members: Sequence[Member]) -> bool:
        return any(self._tensors[m.parameter].dim() > 2 for m in members)

    def _is_blocked(self, member: Member) -> bool:
        """Whether a convolution reads channels by a member, or is depthwise."""
        weight = self._tensors[member.parameter]
        return weight.dim() > 2 and (member.role == "reader" or weight.shape[1] == 1)

    def _kind(self, place: Place, members: Sequence[Member]) -> Kind:
        if place is Place.CONVOLUTION_GROUP:
            return Kind.CONVOLUTION_GROUP
        if self._spatial(members):
            return Kind.CHANNEL
        if place is not Place.ALONE:
            return _KINDS[place]
        reads = sum(m.role == "reader" for m in members)
        return Kind.MLP_UNIT if reads == 1 and len(members) <= 5 else Kind.CHANNEL

    def _reason(self, units: Vector, needed: bool) -> str | None:
        """Why units may not be pruned."""
        classes = self.found.classes
        if self.units.fixed[units[0]]:
            dying = self.units.dying.of(units)
            pinned = dying[classes.pinned[dying]]
            if len(pinned):
                reason: str = classes.reasons[classes.reason[pinned.min()]]()
                return reason
            told = [why for stay, why in self._staying if np.isin(dying, stay).any()]
            return told[0] if told else "part of a grid that stays"
        return "the only channels of an axis" if needed else None

    def _checked(self, found: Sequence[ChannelGroup], blocks: Blocks) -> list[ChannelGroup]:
        """The groups that may be pruned first; those of a block that cannot lose channels evenly get a reason."""
        free = [group for group in found if group.reason is None]
        together = positions_of(np.array([group.block for group in free], np.int64))
        uneven = {block: self._uneven([free[i] for i in at], blocks) for block, at in together.items() if block >= 0}
        checked = [g if g.reason else replace(g, reason=uneven.get(g.block)) for g in found]
        return sorted(checked, key=lambda group: group.reason is not None)

    def _uneven(self, together: Sequence[ChannelGroup], blocks: Blocks) -> str | None:
        """Why the groups of a block cannot lose channels, None where they can."""
        steps = steps_of(together)
        dead = self.units.dead(steps[0][steps[0] >= 0])
        if len(steps) > 1 and not (self.consistency.settle(~dead) & dead).any():
            return None
        classes = self.units.dead(np.flatnonzero(blocks.block == together[0].block))
        for balance in self.found.walks["eval"].balances:
            if any(classes[self.found.of(side)].any() for side in (balance.inputs, balance.outputs)):
                return f"the groups of {describe(balance.node)} cannot lose channels evenly"
        for layers in self.found.walks["eval"].equal:
            if classes[self.found.of(layers.rows)].any():
                return f"the layers and directions of {describe(layers.node)} cannot lose units evenly"
        return "the groups of a convolution cannot lose channels evenly"


@dataclass(frozen=True)
class Repair:
    """Brings back what cannot go without others.

    Attributes:
        grouping: of the module.
        consistency: what every choice keeps.
        gone, costs: as from the arguments of `Grouping.repair`.
        stays, lost: by class, what stays whatever is chosen, and what is gone.
    """

    grouping: Grouping
    consistency: Consistency
    gone: Vector
    costs: Costs
    stays: Mask
    lost: Mask

    def alive(self, units: Vector) -> Mask:
        """The classes that are left when `units` are masked."""
        dead = self.grouping.units.dead(np.concatenate([units, self.gone])) | self.lost
        return self.consistency.settle(~dead | self.stays, self.costs)

    def with_known(self, stays: Mask, lost: Mask | None = None) -> Repair:
        """The same with more that stays, and that is gone."""
        lost = self.lost if lost is None else self.lost | lost
        return replace(self, stays=self.stays | stays, lost=lost & ~stays)


def steps_of(groups: Sequence[ChannelGroup], scores: Sequence[Scores] | None = None) -> Vector:
    """The units of groups that lose channels together, the lowest scores first.

    A row is what one part of a step removes, filled up with -1 where another one removes more.
    """
    units = np.concatenate([group.units for group in groups])
    values = np.zeros(len(units)) if scores is None else np.concatenate(scores)
    cells, share = np.concatenate([g.cells for g in groups]), np.concatenate([g.share for g in groups])
    of_step = np.concatenate([g.parts for g in groups])
    parts = list(positions_of(cells).values())
    steps = min(len(part) // int(share[part[0]]) for part in parts)
    columns = []
    for part in parts:
        counts = np.tile(of_step[part[0]], steps)
        rows = np.full((len(counts), int(counts.max())), -1)
        lowest = part[np.argsort(values[part], kind="stable")][: counts.sum()]
        rows[np.arange(rows.shape[1]) < counts[:, None]] = units[lowest]
        columns.append(rows)
    found: Vector = np.concatenate(columns, axis=1)
    return found


def table(groups: Sequence[ChannelGroup]) -> str:
    """The groups as text, one a line."""
    lines = [f"{'group':40} {'kind':15} {'units':>6} {'MACs each':>12} {'parameters':>11}  members, or why it stays"]
    for g in groups:
        what = g.reason or ", ".join(map(str, g.members))
        lines.append(f"{g.name:40} {g.kind:15} {g.size:6} {g.macs:12,} {g.parameters:11,}  {what}")
    lines += [f"MACs for {text}" for text in dict.fromkeys(g.sample for g in groups) if text]
    return "\n".join(lines) + "\n"
