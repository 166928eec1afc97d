"""The axes of parameters that carry channels: which class each of their slices is, and who sums over them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from fxprune.channels.coupling import Coupling
from fxprune.channels.ids import Mask, Vector


@dataclass(frozen=True)
class ChannelAxis:
    """An axis of a parameter.

    Attributes:
        parameter, axis: which.
        role: "reader" where a contraction sums over it, else "writer".
        vector: the number of its class vector.
    """

    parameter: str
    axis: int
    role: str
    vector: int


@dataclass(frozen=True)
class ChannelAxes:
    """All axes that carry channels, in the order of the parameters.

    Attributes:
        axes: the axes.
        vectors: their distinct class vectors.
        grouped: for the weights of grouped convolutions the classes of axis 1, [groups, channels within each].
    """

    axes: list[ChannelAxis]
    vectors: list[Vector]
    grouped: dict[str, Vector]

    @classmethod
    def of(cls, coupling: Coupling, parameters: Mapping[str, torch.nn.Parameter]) -> ChannelAxes:
        """The axes of parameters."""
        balances = {b.weight: b for walk in coupling.walks.values() for b in walk.balances}
        grouped = {
            name: coupling.of(b.outputs if b.transposed else b.inputs)
            for name, b in balances.items()
            if name in parameters
        }
        summed = _summed(coupling)
        numbers: dict[bytes, int] = {}
        vectors: list[Vector] = []
        axes: list[ChannelAxis] = []
        for name in parameters:
            for axis, ids in enumerate(coupling.parameters.get(name, ())):
                if axis == 1 and name in grouped:
                    vector = grouped[name].reshape(-1)
                elif ids is not None:
                    vector = coupling.of(ids)
                else:
                    continue
                number = numbers.setdefault(vector.tobytes(), len(vectors))
                if number == len(vectors):
                    vectors.append(vector)
                axes.append(ChannelAxis(name, axis, "reader" if (name, axis) in summed else "writer", number))
        return cls(axes, vectors, grouped)

    def __iter__(self) -> Iterator[ChannelAxis]:
        return iter(self.axes)

    def vector(self, axis: ChannelAxis) -> Vector:
        """The classes of an axis; for axis 1 of a grouped convolution those of all groups, one after the other."""
        return self.vectors[axis.vector]

    @cached_property
    def by_vector(self) -> list[list[int]]:
        """By class vector, the numbers of the axes that have it."""
        found: list[list[int]] = [[] for _ in self.vectors]
        for number, axis in enumerate(self.axes):
            found[axis.vector].append(number)
        return found

    def slices(self, name: str, axis: int, tensor: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """A view of a tensor of a parameter's shape, and its axes that are not those of the class vector."""
        first = 1
        if axis == 1 and name in self.grouped:
            tensor, first = tensor.unflatten(0, (len(self.grouped[name]), -1)).transpose(1, 2), 2
        else:
            tensor = tensor.movedim(axis, 0)
        tensor = tensor.unsqueeze(-1)
        return tensor, list(range(first, tensor.dim()))

    def clear(self, axis: ChannelAxis, mask: torch.Tensor, alive: Mask) -> None:
        """Set to zero, in place, what is dead along an axis of a mask of the parameter's shape; `alive` is by class."""
        shape = [-1 if d == axis.axis else 1 for d in range(mask.dim())]
        if axis.axis == 1 and axis.parameter in self.grouped:
            groups, width = self.grouped[axis.parameter].shape
            mask, shape = mask.view(groups, -1, *mask.shape[1:]), [groups, 1, width, *shape[2:]]
        mask *= torch.from_numpy(alive[self.vector(axis)]).to(mask).reshape(shape)


def _summed(coupling: Coupling) -> set[tuple[str, int]]:
    """The parameter axes that contractions sum over and that hold the rows of none."""
    summed, written = set[tuple[str, int]](), set[tuple[str, int]]()
    for walk in coupling.walks.values():
        for reader in walk.readers:
            if reader.source is None or reader.rows is None:
                continue
            for axis in range(len(coupling.parameters[reader.source])):
                (written if axis in reader.row_axes else summed).add((reader.source, axis))
    return summed - written
