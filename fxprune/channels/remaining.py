"""What is dead and stays, and why: slices of weights that are zero, or that nothing reads but what is dead itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fxprune.channels.coupling import Coupling
from fxprune.channels.ids import Mask, Vector
from fxprune.channels.liveness import Liveness
from fxprune.channels.readers import Reader
from fxprune.channels.reasons import FOR_DEAD, FOR_FIXED, ReadBy, Reason
from fxprune.channels.registry import REGISTRY
from fxprune.channels.rules.selection import Embedding
from fxprune.channels.used_weights import slices_with_weights


@dataclass(frozen=True)
class _Written:
    """Slices of a weight that write channels.

    Attributes:
        name, axis, indices: of the slices.
        classes: of each the class that it writes.
        zero: which are zero.
        where: what else tells them, in words.
    """

    name: str
    axis: int
    indices: Vector
    classes: Vector
    zero: Mask
    where: str = ""


def dead_that_stay(relations: Coupling, live: Liveness) -> list[tuple[str, int, list[int], str]]:
    """Slices of weights that are zero or that nothing needs, and stay: (parameter, axis, indices, why)."""
    texts: dict[tuple[Reason, bool], str] = {}
    stayed = []
    for written in _written(relations, live):
        indices_of: dict[str, list[int]] = {}
        needed = live.needed[written.classes]
        for at in np.flatnonzero(live.alive[written.classes] & (written.zero | ~needed)).tolist():
            key = live.why(int(written.classes[at])), bool(needed[at])
            if key not in texts:
                texts[key] = key[0].text() + ("" if key[1] else _of_dead(key[0], live))
            indices_of.setdefault(texts[key] + written.where, []).append(int(written.indices[at]))
        stayed += [(written.name, written.axis, indices, text) for text, indices in indices_of.items()]
    return stayed


def _of_dead(why: Reason, live: Liveness) -> str:
    """What is to be said besides of what reads a channel that nothing needs."""
    if not isinstance(why, ReadBy):
        return ""
    return FOR_FIXED if why.node in live.fixed else FOR_DEAD


def _written(relations: Coupling, live: Liveness) -> Iterator[_Written]:
    """The axes of weights that write channels, each once; weights with several axes of rows by cells as well."""
    told: set[tuple[str, int]] = set()
    for reader in live.readers:
        for axis in reader.row_axes if reader.source is not None and reader.rows is not None else ():
            name = str(reader.source)
            if (name, axis) in told:
                continue
            told.add((name, axis))
            if len(reader.row_axes) == 1:
                yield _whole(name, axis, *_rows(relations, reader))
            elif (found := _slices(relations, name, axis)) is not None:
                yield _whole(name, axis, *found)
                if axis == reader.row_axes[-1]:
                    yield from _cells(relations, live, reader)
    for call in REGISTRY.calls(relations.walks["eval"].graph):
        if isinstance(call, Embedding) and call.weight.op == "get_attr":
            name = str(call.weight.target)
            found = _slices(relations, name, 1)
            if found is not None and (name, 1) not in told:
                told.add((name, 1))
                yield _whole(name, 1, *found)


def _whole(name: str, axis: int, classes: Vector, zero: Mask) -> _Written:
    return _Written(name, axis, np.arange(len(classes)), classes, zero)


def _cells(relations: Coupling, live: Liveness, reader: Reader) -> Iterator[_Written]:
    """The rows of a weight with several axes of rows, those along the last of these together.

    What is dead in whole, along one of the axes, is no cell of its own.
    """
    name, axes = str(reader.source), reader.row_axes
    sizes = [relations.tensors[name].shape[axis] for axis in axes]
    rows, empty = _rows(relations, reader)
    classes, zero = rows.reshape(sizes), empty.reshape(sizes)
    needed = np.ones(sizes, bool)
    for at, axis in enumerate(axes):
        ids = relations.parameters[name][axis]
        if ids is not None:
            needed &= live.needed[relations.of(ids)].reshape([-1 if other == at else 1 for other in range(len(axes))])
    for place in np.ndindex(*sizes[:-1]):
        indices = np.flatnonzero(needed[place])
        where = ", ".join(f"{index} of axis {axis}" for index, axis in zip(place, axes, strict=False))
        yield _Written(name, axes[-1], indices, classes[place][indices], zero[place][indices], f", at {where}")


def _rows(relations: Coupling, reader: Reader) -> tuple[Vector, Mask]:
    """The rows of a reader, those of a convolution in groups one group after the other."""
    assert reader.rows is not None
    return relations.of(reader.rows.reshape(-1)), ~reader.used.rows_with().reshape(-1)


def _slices(relations: Coupling, name: str, axis: int) -> tuple[Vector, Mask] | None:
    """The slices of a parameter along an axis; None where that has size one."""
    axes = relations.parameters.get(name)
    ids = None if axes is None else axes[axis]
    if ids is None:
        return None
    return relations.of(ids), ~slices_with_weights(relations.tensors[name].detach(), axis)
