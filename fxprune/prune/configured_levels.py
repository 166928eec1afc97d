"""Widths that one number of a configuration gives together, each rounded: choices are the values of that number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fxprune.channels.groups import ChannelGroup, Scores
from fxprune.channels.ids import Vector
from fxprune.channels.stairs import Limit, Steps
from fxprune.graph.configurations import Axis, Configuration, Shapes, differing

_VALUES = 96  # of a number that are tried


@dataclass(frozen=True)
class Level:
    """What a class makes of another value of a number: by axis, how many channels it then has."""

    value: float
    left: dict[Axis, int]


def levels_of(configuration: Configuration, name: str) -> list[Level]:
    """The smaller models that a class makes of a fraction, by what they have left, the largest first.

    Those alone in which nothing changes but what follows from the number.
    """
    number, axes = float(configuration.numbers[name]), configuration.followers[name]
    found: list[Level] = []
    for step in range(_VALUES - 1, 0, -1):
        value = round(number * step / _VALUES, 4)
        shapes = configuration.built({name: value})
        if shapes is None or not axes.issuperset(differing(configuration.shapes, shapes)):
            continue
        left = {(tensor, axis): shapes[tensor][axis] for tensor, axis in axes}
        changes = [size - configuration.shapes[tensor][axis] for (tensor, axis), size in left.items()]
        is_new = not found or found[-1].left != left
        if max(changes) <= 0 and min(changes) < 0 and is_new:
            found.append(Level(value, left))
    return found


def is_rounded(configuration: Configuration, name: str) -> bool:
    """Whether a number is a fraction from which several sizes follow that are not all multiples of it."""
    axes = configuration.followers.get(name, frozenset())
    sizes = {configuration.shapes[tensor][axis] for tensor, axis in axes}
    is_fraction = type(configuration.numbers[name]) is float
    if not is_fraction or len(sizes) < 3:
        return False
    return configuration.proportional[name] != axes or rounds_to_multiples(configuration, name)


def rounds_to_multiples(configuration: Configuration, name: str) -> bool:
    """Whether whole products of a number are rounded, as to multiples of eight: of three quarters of it, by size."""
    made = configuration.built({name: float(configuration.numbers[name]) * 3 / 4})
    if made is None:
        return False
    sizes = [(configuration.shapes[tensor][axis], made[tensor][axis]) for tensor, axis in configuration.followers[name]]
    return any(3 * size % 4 == 0 and 4 * less != 3 * size for size, less in sizes)


def gives_all(configuration: Configuration, name: str, groups: Sequence[ChannelGroup], free: frozenset[str]) -> bool:
    """Whether all groups follow from a number, those aside of which nothing that can change gives all axes.

    Where it rounds whole products, none of its groups can go by another choice: most of them are enough.
    """
    axes = configuration.followers[name]
    given = frozenset[Axis]().union(*(configuration.followers[other] for other in free))
    members = [{(member.parameter, member.axis) for member in group.members} for group in groups]
    follow = [own <= axes for own in members if own <= given]
    return all(follow) or (2 * sum(follow) > len(follow) and rounds_to_multiples(configuration, name))


class Levels(Steps):
    """The levels as steps, each a choice of units that holds the one before.

    Args:
        levels: those of one number. groups: to be cut. scores: of their units.
        most: largest share of a group that goes. least: units that each keeps.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        groups: Sequence[ChannelGroup],
        scores: Sequence[Scores],
        most: float,
        least: int,
    ) -> None:
        self._orders = [
            group.units[np.argsort(score, kind="stable")] for group, score in zip(groups, scores, strict=True)
        ]
        taken = [[group.size - count_of(level, group) for group in groups] for level in levels]
        self._taken = [
            each
            for each in taken
            if all(
                gone <= most * group.size + 1e-9 and group.size - gone >= least
                for gone, group in zip(each, groups, strict=True)
            )
        ]

    def __len__(self) -> int:
        return len(self._taken)

    def units(self, stairs: int) -> Vector:
        """The units that go with a level, none with level 0."""
        taken = self._taken[stairs - 1] if stairs else [0] * len(self._orders)
        return np.concatenate([order[:count] for order, count in zip(self._orders, taken, strict=True)])

    def land(self, limit: Limit) -> Vector | None:
        """The units of the first level that keeps a limit, None where none does."""
        height = self.search(lambda units: limit.left(units) <= limit.most)
        return None if height is None else self.units(height)


def count_of(level: Level, group: ChannelGroup) -> int:
    """How many units of a group a level leaves."""
    first = group.members[0]
    return level.left[first.parameter, first.axis]


def is_said_by(levels: Sequence[Level], group: ChannelGroup, shapes: Shapes) -> bool:
    """Whether a group loses what levels say, one unit for each channel."""
    axes = [(member.parameter, member.axis) for member in group.members]
    tensor, axis = axes[0]
    return all(each in levels[0].left for each in axes) and shapes[tensor][axis] == group.size
