"""What is dead and stays, and why: slices of weights that are zero, or that nothing reads but what is dead itself."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fxprune.channels.coupling import Coupling
from fxprune.channels.ids import Mask, Vector
from fxprune.channels.liveness import Liveness
from fxprune.channels.readers import Reader
from fxprune.channels.reasons import FOR_DEAD, ReadBy, Reason
from fxprune.channels.registry import REGISTRY
from fxprune.channels.rules.selection import Embedding


def dead_that_stay(relations: Coupling, live: Liveness) -> list[tuple[str, int, list[int], str]]:
    """Slices of weights that are zero or that nothing needs, and stay: (parameter, axis, indices, why)."""
    texts: dict[tuple[Reason, bool], str] = {}
    stayed = []
    for name, axis, classes, zero in _written(relations, live):
        indices_of: dict[str, list[int]] = {}
        for index in np.flatnonzero(live.alive[classes]).tolist():
            why = live.why(int(classes[index]))
            needed = bool(live.needed[classes[index]])
            if needed and not zero[index]:
                continue
            if (why, needed) not in texts:
                texts[why, needed] = why.text() + ("" if needed or not isinstance(why, ReadBy) else FOR_DEAD)
            indices_of.setdefault(texts[why, needed], []).append(index)
        stayed += [(name, axis, indices, text) for text, indices in indices_of.items()]
    return stayed


def _written(relations: Coupling, live: Liveness) -> Iterator[tuple[str, int, Vector, Mask]]:
    """The axes of weights that write channels: (parameter, axis, classes, which slices are zero), each once."""
    told: set[tuple[str, int]] = set()
    for reader in live.readers:
        for axis in reader.row_axes if reader.source is not None and reader.rows is not None else ():
            if (str(reader.source), axis) in told:
                continue
            told.add((str(reader.source), axis))
            if len(reader.row_axes) == 1:
                yield str(reader.source), axis, *_rows(relations, reader)
            elif (found := _slices(relations, str(reader.source), axis)) is not None:
                yield str(reader.source), axis, *found
    for call in REGISTRY.calls(relations.walks["eval"].graph):
        if isinstance(call, Embedding) and call.weight.op == "get_attr":
            name = str(call.weight.target)
            found = _slices(relations, name, 1)
            if found is not None and (name, 1) not in told:
                told.add((name, 1))
                yield name, 1, *found


def _rows(relations: Coupling, reader: Reader) -> tuple[Vector, Mask]:
    """The rows of a reader, those of a convolution in groups one group after the other."""
    assert reader.rows is not None
    return relations.of(reader.rows.reshape(-1)), ~reader.used.any(-1).reshape(-1)


def _slices(relations: Coupling, name: str, axis: int) -> tuple[Vector, Mask] | None:
    """The slices of a parameter along an axis; None where that has size one."""
    axes = relations.parameters.get(name)
    ids = None if axes is None else axes[axis]
    if ids is None:
        return None
    tensor = relations.tensors[name].detach()
    others = [dim for dim in range(tensor.dim()) if dim != axis]
    zero: Mask = ~(tensor != 0).any(dim=others).cpu().numpy() if others else (tensor == 0).cpu().numpy()
    return relations.of(ids), zero
