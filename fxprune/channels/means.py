"""Means over space: what is known of them where single positions depend on the input.

A channel that is normalized over space has the norm's shift as its mean, whatever comes in: who takes it
reads a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fxprune.channels.axes import Axis, reduced_shape
from fxprune.channels.values import Move


@dataclass(frozen=True, eq=False)
class SpaceMeans:
    """Channels whose mean over space no input changes.

    Attributes:
        where: in the reduced shape of the value, which channels.
        value: their means, likewise.
        space: the axes of space, ascending.
    """

    where: Tensor
    value: Tensor
    space: tuple[int, ...]

    @property
    def last(self) -> int:
        """The last axis of space."""
        return max(self.space)

    def fits(self, axes: Sequence[Axis]) -> bool:
        """Whether a value with these axes holds these channels on axis 1, and nothing is known of its positions."""
        return self.are_over(axes, range(2, len(axes)))

    def are_over(self, axes: Sequence[Axis], space: Sequence[int]) -> bool:
        """Whether a value with these axes holds these channels, and these are its axes of space."""
        return reduced_shape(axes) == list(self.where.shape) and list(self.space) == sorted(space)

    def moved(self, move: Move) -> SpaceMeans:
        """The same after a movement of data, in reduced form, that leaves space where it is."""
        return replace(self, where=move(self.where), value=move(self.value))

    def permuted(self, order: Sequence[int]) -> SpaceMeans:
        """The same with axes in another order."""
        space = tuple(at for at, axis in enumerate(order) if axis in self.space)
        return SpaceMeans(self.where.permute(*order), self.value.permute(*order), space)


def has_space(axes: Sequence[Axis]) -> bool:
    """Whether a value has channels on axis 1, and axes of space that carry none."""
    shape = reduced_shape(axes)
    return len(shape) > 2 and shape[0] == 1 and all(size == 1 for size in shape[2:])
