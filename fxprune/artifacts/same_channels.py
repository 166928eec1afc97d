"""Which axes of parameters and buffers hold the same channels, as the graphs relate them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fxprune.channels.coupling import coupling
from fxprune.channels.ids import Classes, Vector
from fxprune.channels.relation import Relation
from fxprune.channels.units import UnitTable
from fxprune.graph.traced import TracedModule


def same_channels(final: TracedModule) -> Mapping[tuple[str, int], int]:
    """A number for each axis of a tensor that carries channels, equal for axes of the same ones: (name, axis) -> it."""
    found = coupling(final)
    channel = _channels(found.classes)
    numbers: dict[bytes, int] = {}
    return {
        (name, axis): numbers.setdefault(channel[found.of(ids)].tobytes(), len(numbers))
        for name, axes in found.parameters.items()
        for axis, ids in enumerate(axes)
        if ids is not None
    }


def _channels(classes: Classes) -> Vector:
    """By class a number, the same for positions of grids that go with the same factors."""
    units = UnitTable(classes, [], np.zeros(classes.count, bool))
    lefts, rights = units.killers.lefts, units.killers.rights
    factors = ~units.positions[rights]
    return Relation(lefts[factors], rights[factors], classes.count, classes.count).signatures()
