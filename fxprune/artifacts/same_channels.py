"""Which axes of parameters and buffers hold the same channels, as the graphs relate them."""

from __future__ import annotations

from collections.abc import Mapping

from fxprune.channels.coupling import coupling
from fxprune.graph.traced import TracedModule


def same_channels(final: TracedModule) -> Mapping[tuple[str, int], int]:
    """A number for each axis of a tensor that carries channels, equal for axes of the same ones: (name, axis) -> it."""
    found = coupling(final)
    numbers: dict[bytes, int] = {}
    return {
        (name, axis): numbers.setdefault(found.of(ids).tobytes(), len(numbers))
        for name, axes in found.parameters.items()
        for axis, ids in enumerate(axes)
        if ids is not None
    }
