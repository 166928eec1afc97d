"""Groups of channels that leave a model's own class runnable: what must stay equal, and what cannot go at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from fxprune.channels.groups import ChannelGroup, Grouping, Kind
from fxprune.channels.ids import Mask, Vector
from fxprune.channels.registry import REGISTRY
from fxprune.channels.rules.grouped_products import GroupedProduct
from fxprune.channels.values import Value
from fxprune.graph.configurations import Axis, Configuration, is_within, unread_tensors
from fxprune.prune.alike_sizes import alike_sizes
from fxprune.prune.class_limits import ClassLimits, parts_of_axes
from fxprune.prune.configured_levels import Level, gives_all, is_rounded, is_said_by, levels_of

_PARTS = ("aten.chunk.default", "aten.split.Tensor")
_LONGER = 8  # than the longest axis, what all lengths divide
_LINE = 16  # bytes
_STEPS = (2, 4, 8)  # units that go together where one cannot
_TIMES = (4, 2)  # steps of a group, where none of these do
_GIVEN = "its size follows from the configuration of {}, together with sizes that stay"
_HEADS = "its class says the size of all heads together by another width: what is in each goes"


def runnable_groups(
    grouping: Grouping, limits: ClassLimits, pick: Callable[[Sequence[ChannelGroup]], list[ChannelGroup]]
) -> Grouping:
    """The groups with what the class of a model asks for.

    Parts by `chunk` stay equal, as does what one attribute or the shape of another tensor sizes. Sizes that one
    number of a configuration gives change alike, where all of them may be pruned, or, where it is a fraction whose
    products are rounded and that gives all that is asked for, as its values say (`ClassLimits.levels`). The others
    stay, as do channels within heads of which two numbers say how many there are.

    Args:
        grouping: of the model's graphs.
        limits: what is known of the class of the model that was traced.
        pick: which groups are asked for.
    """
    model = limits.model
    sizes = alike_sizes(grouping, model)
    rows = [*_parts(grouping), *_whole_lines(grouping), *sizes.rows, *limits.alike]
    staying = [(heads, _HEADS) for heads in sizes.heads]
    unread = unread_tensors(model, grouping.plain.graphs.values())
    configured = Configuration.all_of(model, unread, valid=True, builds=limits.builds)
    # keywords name hardly any size of a layer
    numbers = [_Numbers(grouping, own) for own in configured if not own.by_keywords]
    if not numbers:
        found = Grouping(grouping.plain, rows, staying, for_class=True) if rows else grouping
        found.groups = limits.limited(found.groups)
        return found
    asked = pick(grouping.groups)
    dead = numbers[0].dead(asked)
    free = [own.needed(own.free(dead) - own.left_out(limits), asked) for own in numbers]
    limits.is_configured = True
    limits.doubtful = [
        f"{own.prefix}{n}" for own, names in zip(numbers, free, strict=True) for n in own.doubtful(names)
    ]
    limits.levels = _levels(configured[0], free[0], asked) if not configured[0].path else []
    if limits.levels:
        found = Grouping(grouping.plain, rows, staying, for_class=True)
        reason, shapes = _GIVEN.format(type(model).__name__), configured[0].shapes
        groups = [
            g if g.reason or is_said_by(limits.levels, g, shapes) else replace(g, reason=reason) for g in found.groups
        ]
        found.groups = limits.limited(groups)
        return found
    for own, names in zip(numbers, free, strict=True):
        rows += [*own.rows(names), *own.steps(names, grouping.groups)]
    found = Grouping(grouping.plain, rows, staying, for_class=True)
    groups = found.groups
    for own, names in zip(numbers, free, strict=True):
        reason = _GIVEN.format(own.class_name)
        groups = [g if g.reason or own.leaves(g, names) else replace(g, reason=reason) for g in groups]
    found.groups = limits.limited(groups)
    return found


def _levels(configuration: Configuration, free: frozenset[str], asked: Sequence[ChannelGroup]) -> list[Level]:
    """Those of the number that gives all that is asked for, rounded, where there is one."""
    rounded = [n for n in sorted(free) if is_rounded(configuration, n) and gives_all(configuration, n, asked, free)]
    return levels_of(configuration, rounded[0]) if len(rounded) == 1 else []


def _parts(grouping: Grouping) -> Iterator[Vector]:
    """The classes of parts that code takes for equal ones, [parts, n]."""
    for node, classes in parts_of_axes(grouping):
        if str(node.target) in _PARTS and len(classes) > 1 and len({len(own) for own in classes}) == 1:
            yield np.stack(classes)


def _whole_lines(grouping: Grouping) -> Iterator[Vector]:
    """The classes of groups that products by groups read, [lanes, n]: torch's take rows of whole lines of bytes."""
    walk = grouping.found.walks["eval"]
    for call in REGISTRY.calls(walk.graph):
        if not isinstance(call, GroupedProduct) or not isinstance(rows := walk.env[call.data], Value):
            continue
        lanes = _LINE // call.data.meta["val"].dtype.itemsize
        ids = rows.axes[-1].ids
        if ids is not None and len(ids) % lanes == 0:
            yield grouping.found.of(ids).reshape(lanes, -1)


class _Numbers:
    """The numbers of a configuration, and the channels whose counts follow from them."""

    def __init__(self, grouping: Grouping, configuration: Configuration) -> None:
        self._grouping, self._configuration, self._followers = grouping, configuration, configuration.followers
        self._vectors: dict[Axis, Vector] = {
            (axis.parameter, axis.axis): grouping.axes.vector(axis) for axis in grouping.axes
        }
        for tensor, axis in frozenset[Axis]().union(*self._followers.values()) - self._vectors.keys():  # of buffers
            ids = grouping.found.parameters.get(tensor, ())
            if axis < len(ids) and (own := ids[axis]) is not None:
                self._vectors[tensor, axis] = grouping.found.of(own)
        self._parts: dict[tuple[str, Axis], Vector] = {}  # of axes of which not all follows from a number
        self.class_name = type(configuration.model).__name__
        self.prefix = f"{configuration.path}: " if configuration.path else ""

    def left_out(self, limits: ClassLimits) -> set[str]:
        """Those that are to stay."""
        return {name for name in self._configuration.numbers if f"{self.prefix}{name}" in limits.left_out}

    def dead(self, groups: Sequence[ChannelGroup]) -> Mask:
        """By class, whether it could go with units of these groups."""
        return self._grouping.units.dead(np.concatenate([group.units for group in groups]))

    def free(self, dead: Mask) -> frozenset[str]:
        """The numbers that can change: all that follows from them is channels that could go."""
        return frozenset(
            name
            for name, axes in self._followers.items()
            if axes and all(axis in self._vectors and self._follows(name, axis, dead) for axis in axes)
        )

    def _follows(self, name: str, axis: Axis, dead: Mask) -> bool:
        """Whether all of an axis that follows from a number could go, or all of the part of it that does.

        Such an axis reads several streams, or writes them. The part is what other axes hold that follow from the
        number, or all that could go; it must be as long as the axis changes with the number.
        """
        vector, proportional = self._vectors[axis], self._configuration.proportional[name]
        if axis in proportional and dead[vector].all():
            return True
        held = [own for other in proportional if dead[own := self._vectors.get(other, vector)].all()]
        for inside in (np.isin(vector, np.concatenate([*held, vector[:0]])), dead[vector]):
            if inside.any() and self._configuration.changes_by_part(name, axis, int(inside.sum())):
                self._parts[name, axis] = vector[inside]
                return True
        return bool(dead[vector].all())

    def needed(self, free: frozenset[str], groups: Sequence[ChannelGroup]) -> frozenset[str]:
        """Without numbers by which others' sizes are rounded, as to multiples of eight, where all goes without them."""
        for name in self.rounding(free):
            others = free - {name}
            own = self._followers[name]
            if own.isdisjoint(frozenset[Axis]().union(*(self._followers[other] for other in others))):
                continue
            touched = [group for group in groups if any((m.parameter, m.axis) in own for m in group.members)]
            if all(self.leaves(group, others) or not self.leaves(group, free) for group in touched):
                free = others
        return free

    def rounding(self, free: frozenset[str]) -> list[str]:
        """Those that say sizes otherwise than in proportion, the one of most sizes first, whole ones before others."""
        followers = self._followers
        found = (name for name in free if self._proportional(name) != followers[name])
        return sorted(
            found, key=lambda name: (-len(followers[name]), type(self._configuration.numbers[name]) is float, name)
        )

    def doubtful(self, free: frozenset[str]) -> list[str]:
        """Those that may not say all that is chosen: that round sizes, or scale what is computed with these."""
        return self.rounding(free) + sorted(free & self._configuration.scaling)

    def _proportional(self, name: str) -> frozenset[Axis]:
        """The axes that are multiples of a number, or have a part that is."""
        return self._configuration.proportional[name] | {axis for other, axis in self._parts if other == name}

    def rows(self, free: frozenset[str]) -> Iterator[Vector]:
        """The classes of axes that follow from the same number, [axes, n], each as often as the longest asks for.

        Axes whose sizes are multiples of a number lose the same fraction; others change alike with those of one length.
        """
        for name in sorted(free):
            proportional = self._proportional(name)
            for axes in (proportional, self._followers[name] - proportional):
                own = [self._parts.get((name, axis), self._vectors[axis]) for axis in sorted(axes)]
                distinct = {vector.tobytes(): vector for vector in own}
                lengths = sorted({len(vector) for vector in distinct.values()})
                whole = math.lcm(*lengths)
                if axes is proportional and whole <= _LONGER * max(lengths, default=0):
                    parts = [list(distinct.values())]
                else:
                    parts = [[v for v in distinct.values() if len(v) == length] for length in lengths]
                for alike in parts:
                    if len(alike) > 1:
                        longest = math.lcm(*map(len, alike))
                        yield np.stack([np.repeat(vector, longest // len(vector)) for vector in alike])

    def steps(self, free: frozenset[str], groups: Sequence[ChannelGroup]) -> Iterator[Vector]:
        """The classes of groups that lose channels by steps of some size alone, [size, times].

        Each row keeps equally many, so that what is left is a multiple of the size: of a width that a whole ratio
        multiplies, or of the groups of a convolution.
        """
        for group in groups:
            times = self._times(group, free) if group.reason is None else None
            if times is not None:
                yield group.units.reshape(-1, times)

    def _times(self, group: ChannelGroup, free: frozenset[str]) -> int | None:
        """How many steps a group has, None where its units can go one by one, or not at all."""
        kinds = Kind.CHANNEL, Kind.MLP_UNIT, Kind.HEAD, Kind.KEY_VALUE_GROUP
        if group.kind not in kinds or self._goes(group, free, group.size):
            return None
        axis = self._axes(group)[0]
        numbers = [self._configuration.numbers[name] for name in sorted(self._saying(axis) & free)]
        for times in (*numbers, *(group.size // size for size in _STEPS), *_TIMES):
            is_whole = type(times) is int and times > 1 and group.size % times == 0
            if is_whole and self._goes(group, free, int(times)):
                return int(times)
        return None

    def leaves(self, group: ChannelGroup, free: frozenset[str]) -> bool:
        """Whether a group may lose channels."""
        return self._goes(group, free, group.size) or self._times(group, free) is not None

    def _goes(self, group: ChannelGroup, free: frozenset[str], units: int) -> bool:
        """Whether numbers that can change say every axis of a group with one of so many units less, one or together."""
        for axis in self._axes(group):
            saying = self._saying(axis)
            if group.kind == Kind.HEAD_CHANNEL and len(saying) > 1:
                return False
            alone = any(self._says(name, axis, group, units) for name in saying & free)
            if not alone and not self._configuration.are_divisible(sorted(saying & free), axis, units):
                return False
        return True

    def _axes(self, group: ChannelGroup) -> list[Axis]:
        """Those of a group's axes that are of the model with this configuration."""
        inside = (m for m in group.members if is_within(m.parameter, self._configuration.path))
        return [(member.parameter, member.axis) for member in inside]

    def _says(self, name: str, axis: Axis, group: ChannelGroup, units: int) -> bool:
        """Whether a number says an axis of a group with one of so many units less."""
        part = self._parts.get((name, axis))
        if part is not None and not self.dead([group])[part].any():
            return False
        return self._configuration.is_divisible(name, axis, units, None if part is None else len(part))

    def _saying(self, axis: Axis) -> set[str]:
        """The numbers that an axis follows from."""
        return {name for name, axes in self._followers.items() if axis in axes}
