"""What reads channels: contractions; and what must lose equally many: groups of convolutions, recurrent layers."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor, fx

from fxprune.channels.ids import Mask, Vector
from fxprune.channels.positions import PositionMaps
from fxprune.channels.used_weights import UsedWeights

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

# why what is read stays
READ = "reads it, and it is not constant there, as far as constants and ranges of values are followed"
MULTIPLIED = "reads it, and it is not always zero there"
UNFOLDED = "reads it, a constant there for which it has no place"
BORDERED = "reads it, and it is constant there but for the border of zero padding: without it a map is to be added"
COUNTED = "counts it, and it is not zero there"


@dataclass(frozen=True, eq=False)
class Bias:
    """Where the constants of removed channels go.

    Attributes:
        node: what is added to the rows now, None where nothing is.
        argument: the name of the call's argument that it is, or would be; None where the operator has none.
        ids: of each axis of a new bias, None for one of size one; those of the rows alone where it is None.
    """

    node: fx.Node | None = None
    argument: str | None = None
    ids: tuple[Vector | None, ...] | None = None


@dataclass(eq=False)
class Reader:
    """A contraction: it needs column i (ids `columns[g, i]`) while a row with a non-zero weight there is alive.

    Attributes:
        rows: output ids, [groups, rows]; None where the output always needs the columns.
        columns: input ids, [groups, columns].
        used: of [groups, rows, columns], the weights that are not zero.
        soft: [groups, columns], columns that are not needed: they are zero, fold or merge.
        constant: [groups, columns], value of the known input channels, NaN elsewhere.
        folds, merges: [groups, columns], non-zero constants that go into the bias, into a representative column.
        mapped, maps: [groups, columns], constants of positions that go into a map which is added; their values,
            None where they stay.
        table: the weight as a view [groups, rows, columns, taps].
        source: name of the parameter that `table` is a view of.
        row_axes: the axes of this parameter that hold groups and rows.
        bias: where constants are folded into.
        key: the same for the same layer in every graph.
        why: in words, what keeps a column.
    """

    node: fx.Node
    rows: Vector | None
    columns: Vector
    used: UsedWeights
    soft: Mask | None = None
    constant: Floats | None = None
    folds: Mask | None = None
    merges: Mask | None = None
    mapped: Mask | None = None
    maps: PositionMaps | None = None
    table: Tensor | None = None
    source: str | None = None
    row_axes: tuple[int, ...] = (0,)
    bias: Bias = Bias()
    key: Hashable = None
    why: str = READ

    def without_maps(self) -> None:
        """Ask for the channels that are constants of positions."""
        if self.mapped is not None and self.soft is not None:
            self.soft = self.soft & ~self.mapped
        self.maps = None


@dataclass(frozen=True, eq=False)
class Balance:
    """Groups of a convolution: each remaining group keeps equally many inputs [G, n] and outputs [G, m]."""

    node: fx.Node
    inputs: Vector
    outputs: Vector
    weight: str
    transposed: bool


@dataclass(frozen=True, eq=False)
class EqualCounts:
    """Rows of ids [n, m] of which equally many stay: the units of all layers and directions of a recurrent call."""

    node: fx.Node
    rows: Vector


@dataclass(frozen=True, eq=False)
class MoreCells:
    """Ids of which more stay than of others: the cells of a recurrent layer, and its projected units."""

    node: fx.Node
    cells: Vector
    units: Vector
