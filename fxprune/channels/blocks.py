"""Blocks: units that must go together so that the groups of a convolution stay equal.

A grouped convolution has two sides, its inputs [groups, n] and its outputs [groups, m]; what is left of either must be
as many channels in every group that is left. So what a unit takes from each group decides what else must go with it.

Take `Conv2d(8, 8, 3, groups=2)`. Its inputs are classes [[0, 1, 2, 3], [4, 5, 6, 7]], its outputs [[8, 9, 10, 11],
[12, 13, 14, 15]]. Three cases:

(1) A unit that takes as much from every group, or a group with all its inputs and outputs, is free: where the inputs
    come from a channel shuffle, the unit that kills 0 and 4 takes one from each; a unit that kills 0 to 3 and 8 to 11
    is the first group. Its block is -1.
(2) Where every class is a unit of its own, unit 0 takes (1, 0) from the inputs, unit 4 takes (0, 1). Units that take
    the same part of every group are a cell: {0, 1, 2, 3}, {4, 5, 6, 7}. The fewest cells that take as much from every
    group when each loses one unit, here (1, 1), are a block; a step of it takes one unit of each cell.
(3) Where the channels of the second group come in pairs, units 0 to 3 take (1, 0), and two units take (0, 2) each: one
    of each would take (1, 2). Cells of 4 and of 2 units that hang together each lose the same fraction: by a step of
    the block the first cell loses its share of 4 / 2 = 2 units, the second its share of 2 / 2 = 1. Such a step may be
    large: it is made of parts, each the fewest units that take as much from every group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fxprune.channels.ids import Ids, Mask, Vector, distinct
from fxprune.channels.relation import Relation, numbered, positions_of
from fxprune.channels.units import Balanced, UnitTable

MOST_CELLS = 12  # of a block, whose subsets are tried
MOST_TRIED = 20_000  # ways to take units of its cells, one unit after the other


@dataclass(frozen=True)
class Blocks:
    """By class, for the unit that it names.

    Attributes:
        block: the block's number, -1 for a unit that is free.
        cell: the number of its cell, 0 for a unit that is free; units of one cell take the same part of every group.
        share: the units that its cell loses by one step of its block.
        parts: from a cell's number to what of its share goes with each part of a step; nothing where a step is one.
    """

    block: Vector
    cell: Vector
    share: Vector
    parts: Mapping[int, Vector] = field(default_factory=dict)

    def parts_of(self, units: Vector) -> Vector:
        """[units, parts], what the cells of units lose with each part of a step."""
        found = [self.parts.get(int(self.cell[unit]), self.share[unit : unit + 1]) for unit in units]
        most = max(map(len, found))
        return np.stack([np.pad(own, (0, most - len(own))) for own in found])


@dataclass(frozen=True)
class Takes:
    """What units take from the groups of convolutions: an entry for each unit and group that it takes something of.

    Attributes:
        unit, group, count: by entry; groups are numbered over all sides.
        side, pair: by entry, the side of its group, and the number of its pair of a unit and a side.
        side_of, width: by group, its side (2 k for the inputs and 2 k + 1 for the outputs of convolution k) and size.
        groups: by side, the number of its groups.
    """

    unit: Vector
    group: Vector
    count: Vector
    side: Vector
    pair: Vector
    side_of: Vector
    width: Vector
    groups: Vector

    @classmethod
    def of(cls, units: UnitTable, sides: Sequence[Vector]) -> Takes:
        """Of all units; a side is [groups, channels of each]."""
        groups = np.array([len(side) for side in sides])
        width = np.repeat([side.shape[1] for side in sides], groups)
        group_of = np.repeat(np.arange(len(width)), width)
        at, unit = units.killers.join(np.concatenate([side.reshape(-1) for side in sides]))
        unit, group, count = distinct(unit, group_of[at])
        side_of = np.repeat(np.arange(len(sides)), groups)
        side = side_of[group]
        return cls(unit, group, count, side, numbered(unit, side), side_of, width, groups)


def find_blocks(units: UnitTable, balances: Sequence[Balanced], usable: Mask) -> Blocks:
    """The blocks of the usable units."""
    count = len(units.dying)
    block, cell, share = np.full(count, -1, np.int64), np.zeros(count, np.int64), np.ones(count, np.int64)
    sides = [side for pair in balances for side in pair]
    if not sides:
        return Blocks(block, cell, share)
    takes = Takes.of(units, sides)
    bound = ~free(takes)
    unit, group, side = takes.unit[bound], takes.group[bound], takes.side[bound]
    hanging_together = Ids()
    hanging_together.fresh(count + len(sides))
    hanging_together.unify(unit, count + side)
    block[unit] = hanging_together.solve().of[unit]
    cell = Relation(unit, group * (takes.count.max() + 1) + takes.count[bound], count, 0).signatures()
    entries = Relation(takes.unit, np.arange(len(takes.unit)), count, len(takes.unit))
    parts: dict[int, Vector] = {}
    following = int(block.max()) + 1
    candidates = np.flatnonzero(usable & (block >= 0))
    for at in positions_of(block[candidates]).values():
        cells = [candidates[at[of_cell]] for of_cell in positions_of(cell[candidates[at]]).values()]
        rest = np.ones(len(cells), bool)
        taken = taken_by(takes, entries, [own[0] for own in cells])
        for chosen in even_sets(taken):
            if rest[chosen].all() and min(len(cells[i]) for i in chosen) > 1:
                block[np.concatenate([cells[i] for i in chosen])] = following
                rest[chosen] = False
                following += 1
        left = [own for own, stays in zip(cells, rest, strict=True) if stays]
        fractions = equal_fractions([len(own) for own in left])
        of_cells = even_parts([side[rest] for side in taken], fractions).T
        for own, each, parts_of_cell in zip(left, fractions, of_cells, strict=True):
            share[own] = each
            parts[int(cell[own[0]])] = parts_of_cell
    return Blocks(block, cell, share, parts)


def free(takes: Takes) -> Mask:
    """Case (1), by entry: its unit takes as much from every group of the side, or whole groups of both sides."""
    pairs = int(takes.pair.max()) + 1
    least, most = np.full(pairs, np.iinfo(np.int64).max), np.zeros(pairs, np.int64)
    np.minimum.at(least, takes.pair, takes.count)
    np.maximum.at(most, takes.pair, takes.count)
    first = np.unique(takes.pair, return_index=True)[1]
    unit, side = takes.unit[first], takes.side[first]
    evenly = (np.bincount(takes.pair) == takes.groups[side]) & (least == most)
    whole = least == takes.width[takes.group[first]]
    keys, other = unit * len(takes.groups) + side, unit * len(takes.groups) + (side ^ 1)
    found: Mask = evenly | (whole & np.isin(other, keys[whole]))
    return found[takes.pair]


def taken_by(takes: Takes, entries: Relation, units: Sequence[int]) -> list[Vector]:
    """What each of some units takes from each group, [units, groups] for each side that they touch."""
    at, entry = entries.join(np.array(units))
    found = []
    for side, own in positions_of(takes.side[entry]).items():
        counts = np.zeros((len(units), int(takes.groups[side])), np.int64)
        counts[at[own], takes.group[entry[own]] - np.searchsorted(takes.side_of, side)] = takes.count[entry[own]]
        found.append(counts)
    return found


def even_sets(taken: Sequence[Vector]) -> list[list[int]]:
    """Case (2): the sets of cells that take as much from every group when each loses one unit, small sets first.

    Args:
        taken: by side, what a unit of each cell takes from each group, [cells, groups].

    Example:
        >>> even_sets([np.array([[1, 0], [0, 1]])])
        [[0, 1]]
    """
    cells = len(taken[0])
    if cells > MOST_CELLS:
        return []
    sets = (np.arange(1, 1 << cells)[:, None] >> np.arange(cells)) & 1
    sets = sets[np.argsort(sets.sum(1), kind="stable")]
    even = np.ones(len(sets), bool)
    for side in taken:
        sums = sets @ side
        even &= sums.max(1) == sums.min(1)
    return [np.flatnonzero(chosen).tolist() for chosen in sets[even]]


def equal_fractions(sizes: Sequence[int]) -> list[int]:
    """Case (3): how many units each cell loses at a time, so that all lose the same fraction.

    Example:
        >>> equal_fractions([4, 2])
        [2, 1]
    """
    if not len(sizes):
        return []
    return [size // int(np.gcd.reduce(sizes)) for size in sizes]


def even_parts(taken: Sequence[Vector], step: Sequence[int]) -> Vector:
    """Case (3): the parts of a step, [parts, cells], as alike as they can be one after the other.

    The least solutions in natural numbers of what makes groups equal (Contejean and Devie, "An efficient incremental
    algorithm for solving systems of linear Diophantine equations", 1994): units are added one at a time, to a cell that
    brings the groups nearer to each other. Every solution is a sum of least ones.

    Args:
        taken: by side, what a unit of each cell takes from each group, [cells, groups].
        step: what each cell loses by a step.

    Returns:
        The step itself where it is not a sum of smaller solutions, or finding out takes too long.

    Example:
        >>> even_parts([np.array([[1, 0], [1, 0], [0, 1]])], [1, 2, 3]).tolist()
        [[0, 1, 1], [1, 0, 1], [0, 1, 1]]
    """
    whole = np.array(step, np.int64)
    if not 0 < len(step) <= MOST_CELLS:
        return whole[None]
    uneven = np.unique(np.concatenate([side[:, 1:] - side[:, :1] for side in taken], axis=1), axis=1)
    least = _least_solutions(uneven, whole)
    found, rest = [], whole
    while rest.any():
        fitting = least[(least <= rest).all(1)]
        if not len(fitting):
            return whole[None]
        gone = (whole - rest + fitting) / whole
        found.append(fitting[np.argmin(gone.max(1) - gone.min(1))])
        rest = rest - found[-1]
    return np.stack(found)


def _least_solutions(uneven: Vector, most: Vector) -> Vector:
    """The smallest x > 0 with x @ uneven = 0 and x <= most, [solutions, cells]; none where too many are tried."""
    unit = np.eye(len(most), dtype=np.int64)
    found, front, tried = unit[:0], unit, 0
    while len(front):
        tried += len(front)
        if tried > MOST_TRIED:
            return unit[:0]
        lacking = front @ uneven
        solved = ~lacking.any(1)
        found = np.concatenate([found, front[solved]])
        nearer = (lacking[~solved] @ uneven.T) < 0
        at, cell = np.nonzero(nearer)
        front = np.unique(front[~solved][at] + unit[cell], axis=0)
        front = front[(front <= most).all(1)]
        for solution in found:
            front = front[~(front >= solution).all(1)]
    return found
