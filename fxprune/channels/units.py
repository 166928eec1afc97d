"""Units: what is masked as a whole. A table of which classes of channels die with which unit.

A class is a channel of its own, a factor of a grid, or a position of one. A unit is named by a class, the smallest of
those that it stands for. It is a channel of its own, or a factor, with which every position in its row or column dies:
two heads of three channels are classes 0 and 1 (heads), 2, 3 and 4 (channels within each) and 5 to 10 (positions);
unit 0 kills 0, 5, 6 and 7, unit 3 kills 3, 6 and 9, and no unit is named by a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from fxprune.channels.ids import Classes, Ids, Mask, Vector, distinct
from fxprune.channels.relation import Relation

Balanced = tuple[Vector, Vector]  # classes of the inputs [groups, n] and of the outputs [groups, m] of a convolution


class Place(IntEnum):
    """Where a unit stands."""

    ALONE = 0
    OUTER = 1  # an outer factor of a grid, as heads
    INNER = 2  # an inner one, as the channels within every head
    OUTERMOST = 3  # an outer factor of a grid whose positions are outer factors, as the keys that heads share
    CONVOLUTION_GROUP = 4  # all channels of one group of a convolution


class UnitTable:
    """Which classes die with which unit.

    Args:
        classes: of the channels.
        balances: the grouped convolutions.
        fixed: by class, whether it cannot go.

    Attributes:
        unit_of: by class, the unit that stands for it.
        dying: from a unit to the classes that die with it.
        killers: from a class to the units that it dies with.
        place: by class, its `Place`.
        named: by class, whether a unit is named by it.
        fixed: by class, whether a fixed class dies with the unit of that name.
    """

    def __init__(self, classes: Classes, balances: Sequence[Balanced], fixed: Mask) -> None:
        count = classes.count
        self.positions = np.zeros(count, bool)
        self.positions[classes.whole] = True
        tied = Ids()
        tied.fresh(count)
        _tie_factors(classes, tied)
        whole_groups = _tie_groups(balances, fixed | self.positions, tied, count)
        self.unit_of: Vector = _smallest_of(tied.solve().of)
        factor, position = _factors(classes)
        every = np.arange(count)
        unit, dies, _ = distinct(self.unit_of[np.concatenate([factor, every])], np.concatenate([position, every]))
        self.dying = Relation(unit, dies, count, count)
        self.killers = self.dying.inverse()
        self.named: Mask = (self.unit_of == every) & ~self.positions
        self.place: Vector = _places(classes, self.unit_of[whole_groups])
        self.fixed: Mask = self.dying.any(fixed)

    def dead(self, units: Vector) -> Mask:
        """By class, whether it dies with one of these units."""
        found = np.zeros(len(self.dying), bool)
        found[self.dying.of(units)] = True
        return found

    def sizes(self) -> Vector:
        """By unit, the number of classes that die with it."""
        return self.dying.counts

    def sums(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """By unit, the sum over the classes that die with it."""
        return np.bincount(self.dying.lefts, values[self.dying.rights], len(self.dying)).astype(np.float64)

    def cuts(self, vectors: Sequence[Vector]) -> Relation:
        """From a unit to the class vectors that it takes something of, without repetition, ascending."""
        holds = Relation.of_sets(vectors, len(self.dying))
        at, unit = self.killers.join(holds.rights)
        unit, vector, _ = distinct(unit, holds.lefts[at])
        return Relation(unit, vector, len(self.dying), len(vectors))

    def alone_in(self, vectors: Sequence[Vector]) -> Mask:
        """By unit, whether it takes all of some class vector."""
        holds = Relation.of_sets(vectors, len(self.dying))
        at, unit = self.killers.join(holds.rights)
        vector, unit, taken = distinct(holds.lefts[at], unit)
        found = np.zeros(len(self.dying), bool)
        found[unit[taken == holds.counts[vector]]] = True
        return found


def _tie_factors(classes: Classes, tied: Ids) -> None:
    """Make one unit of factors of which a position needs only one to go.

    A position of several grids dies with a factor of each: the factors of grids that are alike (the heads of keys and
    of values), else the finest ones (a shuffle after a shuffle), are one unit.
    """
    extent = np.bincount(np.concatenate([classes.left, classes.right]), minlength=classes.count)
    finer = np.where(extent[classes.left] < extent[classes.right], classes.left, classes.right)
    order = np.argsort(classes.whole, kind="stable")
    same = classes.whole[order[1:]] == classes.whole[order[:-1]]
    one, two = order[:-1][same], order[1:][same]
    alike = _one_to_one(classes.left[one], classes.left[two]) & _one_to_one(classes.right[one], classes.right[two])
    for side, where in ((classes.left, alike), (classes.right, alike), (finer, ~alike)):
        tied.unify(side[one[where]], side[two[where]])


def _tie_groups(balances: Sequence[Balanced], taken: Mask, tied: Ids, count: int) -> Vector:
    """Make one unit of each of many narrow groups of a convolution; the first classes of those that are not depthwise.

    Depthwise groups always are one unit each; others where there are many, nothing else is grouped and none is `taken`.
    """
    sides = [side.reshape(-1) for pair in balances for side in pair]
    uses = np.bincount(np.concatenate(sides), minlength=count) if sides else np.zeros(count, np.int64)
    firsts = [np.zeros(0, np.int64)]
    for inputs, outputs in balances:
        both = np.concatenate([inputs, outputs], axis=1)
        depthwise = min(inputs.shape[1], outputs.shape[1]) == 1
        many = len(both) >= both.shape[1] // 2 and bool((uses[both] == 1).all())
        if (depthwise or many) and not taken[both].any():
            tied.unify(np.repeat(both[:, 0], both.shape[1]), both.reshape(-1))
            if not depthwise:
                firsts.append(both[:, 0])
    return np.concatenate(firsts)


def _smallest_of(labels: Vector) -> Vector:
    """For each index the smallest one with the same label."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    found: Vector = first[inverse.reshape(-1)]
    return found


def _places(classes: Classes, whole_groups: Vector) -> Vector:
    place = np.full(classes.count, Place.ALONE, np.int64)
    place[classes.right], place[classes.left] = Place.INNER, Place.OUTER
    above = np.isin(classes.whole, classes.left)
    place[classes.left[above]], place[classes.right[above]] = Place.OUTERMOST, Place.OUTER
    place[whole_groups] = Place.CONVOLUTION_GROUP
    return place


def _one_to_one(a: Vector, b: Vector) -> Mask:
    """Where a value of `a` stands for one value of `b` alone, and the other way round."""
    if not len(a):
        return np.zeros(0, bool)
    few = [np.bincount(column) == 1 for column in distinct(a, b)[:2]]
    found: Mask = few[0][a] & few[1][b]
    return found


def _factors(classes: Classes) -> tuple[Vector, Vector]:
    """Pairs (factor, position that dies with it), also of grids whose factors are positions of a smaller grid."""
    wholes = np.concatenate([classes.whole, classes.whole])
    pairs = np.stack(distinct(np.concatenate([classes.left, classes.right]), wholes)[:2])
    direct = Relation(pairs[0], pairs[1], classes.count, classes.count)
    found = fresh = pairs
    while fresh.shape[1]:
        at, further = direct.join(fresh[1])
        longer = np.stack(distinct(*np.concatenate([found, np.stack([fresh[0][at], further])], axis=1))[:2])
        if longer.shape[1] == found.shape[1]:
            break
        known = np.isin(longer[0] * classes.count + longer[1], found[0] * classes.count + found[1])
        found, fresh = longer, longer[:, ~known]
    return found[0], found[1]
