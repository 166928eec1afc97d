"""The table of units: which classes die with which unit, and what counts as one unit."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fxprune.channels.ids import Classes, Ids, Mask, distinct
from fxprune.channels.relation import Relation, numbered, positions_of
from fxprune.channels.units import Balanced, Place, UnitTable


def vector(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, np.int64)


def none(classes: Classes) -> Mask:
    return np.zeros(classes.count, bool)


def heads() -> Classes:
    """Two heads (classes 0, 1) of three channels (2, 3, 4); their positions are 5 to 10."""
    ids = Ids()
    outer, inner = ids.fresh(2), ids.fresh(3)
    ids.product(outer, inner)
    return ids.solve()


def plain(count: int) -> Classes:
    ids = Ids()
    ids.fresh(count)
    return ids.solve()


def test_a_factor_kills_the_positions_of_its_row_or_column_and_no_unit_is_named_by_a_position() -> None:
    table = UnitTable(heads(), [], none(heads()))
    assert table.dying.row(0).tolist() == [0, 5, 6, 7]
    assert table.dying.row(3).tolist() == [3, 6, 9]
    assert np.flatnonzero(table.named).tolist() == [0, 1, 2, 3, 4]
    assert table.place[:5].tolist() == [Place.OUTER] * 2 + [Place.INNER] * 3
    assert np.flatnonzero(table.dead(vector(0, 3))).tolist() == [0, 3, 5, 6, 7, 9]
    assert table.killers.row(6).tolist() == [0, 3, 6]


def test_a_unit_is_fixed_where_a_position_that_dies_with_it_is() -> None:
    classes = heads()
    fixed = none(classes)
    fixed[10] = True
    assert np.flatnonzero(UnitTable(classes, [], fixed).fixed & UnitTable(classes, [], fixed).named).tolist() == [1, 4]


def test_factors_of_a_grid_of_grids_kill_the_positions_of_both() -> None:
    ids = Ids()
    outermost, outer, inner = ids.fresh(2), ids.fresh(2), ids.fresh(2)
    middle = ids.product(outermost, outer)
    ids.product(middle, inner)
    classes = ids.solve()
    table = UnitTable(classes, [], none(classes))
    assert table.dying.row(0).tolist() == [0, 6, 7, 10, 11, 12, 13]
    assert table.place[[0, 2, 4]].tolist() == [Place.OUTERMOST, Place.OUTER, Place.INNER]


def test_factors_of_alike_grids_over_the_same_positions_are_one_unit() -> None:
    ids = Ids()
    positions = ids.fresh(6)
    keys, values = ids.split(positions, 2), ids.split(ids.fresh(6), 2)
    ids.unify(positions, ids.product(*values))
    classes = ids.solve()
    table = UnitTable(classes, [], none(classes))
    assert table.unit_of[classes.of[values[0]]].tolist() == table.unit_of[classes.of[keys[0]]].tolist()
    assert table.unit_of[classes.of[values[1]]].tolist() == table.unit_of[classes.of[keys[1]]].tolist()


def test_a_depthwise_group_is_one_unit_of_its_input_and_its_outputs() -> None:
    depthwise: Balanced = (vector(0, 1)[:, None], np.array([[2, 3], [4, 5]]))
    table = UnitTable(plain(6), [depthwise], np.zeros(6, bool))
    assert table.dying.row(0).tolist() == [0, 2, 3]
    assert table.place[0] == Place.ALONE


def test_many_narrow_groups_are_one_unit_each_and_two_wide_ones_are_not() -> None:
    narrow: Balanced = (np.arange(8).reshape(4, 2), np.arange(8, 16).reshape(4, 2))
    table = UnitTable(plain(16), [narrow], np.zeros(16, bool))
    assert np.flatnonzero(table.named).tolist() == [0, 2, 4, 6]
    assert table.dying.row(2).tolist() == [2, 3, 10, 11]
    assert table.place[0] == Place.CONVOLUTION_GROUP
    wide: Balanced = (np.arange(8).reshape(2, 4), np.arange(8, 16).reshape(2, 4))
    assert UnitTable(plain(16), [wide], np.zeros(16, bool)).named.all()


def test_groups_with_a_fixed_channel_stay_apart() -> None:
    narrow: Balanced = (np.arange(8).reshape(4, 2), np.arange(8, 16).reshape(4, 2))
    fixed = np.zeros(16, bool)
    fixed[0] = True
    assert UnitTable(plain(16), [narrow], fixed).named.all()


def test_sums_cuts_and_lone_units_follow_the_table() -> None:
    table = UnitTable(heads(), [], none(heads()))
    assert table.sums(np.arange(11.0))[[0, 3]].tolist() == [0 + 5 + 6 + 7, 3 + 6 + 9]
    cuts = table.cuts([vector(5, 6, 7, 8, 9, 10), vector(0, 1), vector(2, 3, 4)])
    assert cuts.row(0).tolist() == [0, 1]
    assert cuts.row(3).tolist() == [0, 2]
    assert np.flatnonzero(table.alone_in([vector(5, 6, 7), vector(2, 3)])).tolist() == [0]


def test_a_relation_joins_inverts_and_asks_for_any() -> None:
    holds = Relation.of_sets([vector(0, 1), vector(), vector(1, 2)], 3)
    assert holds.of(vector(2, 0)).tolist() == [1, 2, 0, 1]
    assert holds.inverse().row(1).tolist() == [0, 2]
    assert holds.any(np.array([True, False, False])).tolist() == [True, False, False]
    assert holds.any(np.array([False, False, True]), vector(2, 1, 0)).tolist() == [True, False, False]


def test_signatures_are_equal_exactly_where_the_lists_are() -> None:
    lists = Relation.of_sets([vector(3, 4), vector(), vector(3), vector(3, 4), vector(4, 3)], 5)
    assert lists.signatures().tolist() == [1, 0, 2, 1, 3]


def test_tuples_are_numbered_in_their_order_and_positions_listed_by_number() -> None:
    numbers = numbered(vector(7, 5, 7, 5), vector(0, 1, 0, 0))
    assert numbers.tolist() == [2, 1, 2, 0]
    assert {key: at.tolist() for key, at in positions_of(numbers).items()} == {0: [3], 1: [1], 2: [0, 2]}
    assert positions_of(vector()) == {}


def test_distinct_tuples_are_those_of_numpy_also_where_their_keys_would_not_fit() -> None:
    generator = np.random.default_rng(0)
    for rows, high in ((1, 5), (2, 7), (3, 3), (3, 2**40)):
        columns = generator.integers(0, high, (rows, 300))
        columns = np.concatenate([columns, columns[:, :50]], axis=1)
        want, counts = np.unique(columns, axis=1, return_counts=True)
        *found, taken = distinct(*columns)
        assert np.array_equal(np.stack(found), want)
        assert np.array_equal(taken, counts)
    assert [len(column) for column in distinct(np.zeros(0, np.int64), np.zeros(0, np.int64))] == [0, 0, 0]
