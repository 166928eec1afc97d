"""Counts of channels that run fast, as measured in onnxruntime."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from fxprune.channels.coupling import Coupling
from fxprune.channels.ids import Mask, Vector

BLOCK = 16  # channels that onnxruntime's convolutions compute at a time
FINEST = 4  # counts of 4 cost as if rounded up to a block, so no smaller multiple gains anything


def fast_multiple(channels: int, fine: bool = False) -> int:
    """The multiple to cut a convolution to: onnxruntime computes in blocks of 16 channels.

    Fewer than 16 save nothing, and their readers leave the blocked layout: they are cut only where `fine` asks for it.
    """
    if fine:
        return next((m for m in (BLOCK, BLOCK // 2, FINEST) if channels >= 2 * m), 1)
    return min(BLOCK, channels)


def distinct(vectors: list[Vector]) -> list[Vector]:
    """Vectors without those that were there before, and without empty ones."""
    return list({v.tobytes(): v for v in vectors if len(v)}.values())


def fast_counts(coupling: Coupling, decided: Collection[tuple[str, int]] = ()) -> list[tuple[Vector, int]]:
    """The class vectors of convolutions, and the multiples that their counts should be of.

    `decided` are axes of parameters whose counts are as they were chosen to be: what holds channels of theirs is left
    alone.

    Counts of 4 cost as if rounded up to 16, so more dead channels gain nothing; around depthwise convolutions, where
    memory traffic decides, multiples of 16 ran 1.24 times faster than those of 4 (MobileNetV2). That is asked for where
    a vector overlaps with no other, so that rounding does not spread.
    """
    classes = coupling.classes
    convolutions = [([coupling.of(v) for v in own], deep) for own, deep in coupling.walks["eval"].aligned]
    depthwise = {v.tobytes() for own, deep in convolutions if deep for v in own}
    near = {v.tobytes() for own, _ in convolutions if any(v.tobytes() in depthwise for v in own) for v in own}
    vectors = distinct([v for own, _ in convolutions for v in own])
    holders = np.zeros(classes.count, np.int64)
    for own_classes in {np.sort(v).tobytes(): v for v in vectors}.values():
        np.add.at(holders, own_classes, 1)
    holders[np.concatenate([classes.whole, classes.left, classes.right])] = 2
    alone = [v.tobytes() in near and bool((holders[v] == 1).all()) for v in vectors]
    chosen = decided_classes(coupling, decided)
    return [
        (v, max(FINEST, fast_multiple(len(v), fine=True)) if wide else FINEST)
        for v, wide in zip(vectors, alone, strict=True)
        if not chosen[v].any()
    ]


def decided_classes(coupling: Coupling, decided: Collection[tuple[str, int]]) -> Mask:
    """The classes of some axes of parameters."""
    found = np.zeros(coupling.classes.count, bool)
    for name, axis in decided:
        axes = coupling.parameters.get(name, [])
        if axis < len(axes) and (ids := axes[axis]) is not None:
            found[coupling.of(ids)] = True
    return found
