"""Groups of channels that leave a model's own class runnable: what must stay equal, and what cannot go at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from fxprune.channels.groups import WHOLE_KINDS, ChannelGroup, Grouping, Kind
from fxprune.channels.ids import Mask, Vector
from fxprune.graph.configurations import Axis, Configuration
from fxprune.prune.alike_sizes import alike_sizes
from fxprune.prune.class_limits import ClassLimits, parts_of_axes

_PARTS = ("aten.chunk.default", "aten.split.Tensor")
_GIVEN = "its size follows from the configuration of {}, together with sizes that stay"
_HEADS = "its class says the size of all heads together by another width: what is in each goes"


def runnable_groups(
    grouping: Grouping, limits: ClassLimits, pick: Callable[[Sequence[ChannelGroup]], list[ChannelGroup]]
) -> Grouping:
    """The groups with what the class of a model asks for.

    Parts by `chunk` stay equal, as does what one attribute or the shape of another tensor sizes. Sizes that one
    number of a configuration gives change alike, where all of them may be pruned; the others stay, as do channels
    within heads of which two numbers say how many there are.

    Args:
        grouping: of the model's graphs.
        limits: what is known of the class of the model that was traced.
        pick: which groups are asked for.
    """
    model = limits.model
    sizes = alike_sizes(grouping, model)
    rows = [*_parts(grouping), *sizes.rows, *limits.alike]
    staying = [(heads, _HEADS) for heads in sizes.heads]
    configuration = Configuration.of(model)
    if configuration is None:
        found = Grouping(grouping.plain, rows, staying, for_class=True) if rows else grouping
        found.groups = limits.limited(found.groups)
        return found
    numbers = _Numbers(grouping, configuration)
    free = numbers.free(numbers.dead(pick(grouping.groups)))
    found = Grouping(grouping.plain, [*rows, *numbers.rows(free)], staying, for_class=True)
    reason = _GIVEN.format(type(model).__name__)
    groups = [g if g.reason or numbers.leaves(g, free) else replace(g, reason=reason) for g in found.groups]
    found.groups = limits.limited(groups)
    return found


def _parts(grouping: Grouping) -> Iterator[Vector]:
    """The classes of parts that code takes for equal ones, [parts, n]."""
    for node, classes in parts_of_axes(grouping):
        if str(node.target) in _PARTS and len(classes) > 1 and len({len(own) for own in classes}) == 1:
            yield np.stack(classes)


class _Numbers:
    """The numbers of a configuration, and the channels whose counts follow from them."""

    def __init__(self, grouping: Grouping, configuration: Configuration) -> None:
        self._grouping, self._followers = grouping, configuration.followers
        self._vectors: dict[Axis, Vector] = {
            (axis.parameter, axis.axis): grouping.axes.vector(axis) for axis in grouping.axes
        }

    def dead(self, groups: Sequence[ChannelGroup]) -> Mask:
        """By class, whether it could go with units of these groups."""
        return self._grouping.units.dead(np.concatenate([group.units for group in groups]))

    def free(self, dead: Mask) -> frozenset[str]:
        """The numbers that can change: all that follows from them is channels that could go."""
        return frozenset(
            name
            for name, axes in self._followers.items()
            if axes and all(axis in self._vectors and dead[self._vectors[axis]].all() for axis in axes)
        )

    def rows(self, free: frozenset[str]) -> Iterator[Vector]:
        """The classes of axes that follow from the same number and are of one length, [axes, n]."""
        for name in sorted(free):
            distinct = {self._vectors[axis].tobytes(): self._vectors[axis] for axis in sorted(self._followers[name])}
            for length in sorted({len(vector) for vector in distinct.values()}):
                alike = [vector for vector in distinct.values() if len(vector) == length]
                if len(alike) > 1:
                    yield np.stack(alike)

    def leaves(self, group: ChannelGroup, free: frozenset[str]) -> bool:
        """Whether a group may lose channels: every one of its axes follows from numbers that can change.

        How many heads there are can change where the number of channels in each stays.
        """
        for member in group.members:
            saying = {name for name, axes in self._followers.items() if (member.parameter, member.axis) in axes}
            if not saying & free or (group.kind not in WHOLE_KINDS and not saying <= free):
                return False
            if group.kind == Kind.HEAD_CHANNEL and len(saying) > 1:
                return False
        return True
