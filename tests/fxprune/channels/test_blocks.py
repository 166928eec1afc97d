"""Blocks of units that must go together: the three cases of `Conv2d(8, 8, 3, groups=2)`, numbers as in the module."""

from __future__ import annotations

import numpy as np

from fxprune.channels.blocks import Blocks, equal_fractions, even_parts, even_sets, find_blocks
from fxprune.channels.ids import Ids
from fxprune.channels.units import Balanced, UnitTable

CONVOLUTION: Balanced = (np.arange(8).reshape(2, 4), np.arange(8, 16).reshape(2, 4))


def blocks_of(ids: Ids, convolution: Balanced = CONVOLUTION) -> tuple[UnitTable, Blocks]:
    classes = ids.solve()
    convolution = classes.of[convolution[0]], classes.of[convolution[1]]
    table = UnitTable(classes, [convolution], np.zeros(classes.count, bool))
    return table, find_blocks(table, [convolution], table.named)


def channels(count: int = 16) -> Ids:
    ids = Ids()
    ids.fresh(count)
    return ids


def test_without_grouped_convolutions_every_unit_is_free() -> None:
    classes = channels(3).solve()
    table = UnitTable(classes, [], np.zeros(3, bool))
    assert find_blocks(table, [], table.named).block.tolist() == [-1, -1, -1]


def test_a_unit_that_takes_as_much_from_every_group_is_free() -> None:
    ids = channels()
    ids.unify(np.arange(4), np.arange(4, 8))
    _, found = blocks_of(ids)
    assert found.block[:4].tolist() == [-1] * 4
    assert (found.block[4:] >= 0).all()  # the outputs are units of their own


def test_a_unit_that_is_a_whole_group_is_free() -> None:
    ids = channels()
    for group in CONVOLUTION[0], CONVOLUTION[1]:
        ids.unify(np.repeat(group[:, 0], 4), group.reshape(-1))
    ids.unify(CONVOLUTION[0][:, 0], CONVOLUTION[1][:, 0])
    _, found = blocks_of(ids)
    assert found.block.tolist() == [-1, -1]


def test_all_inputs_of_a_group_without_its_outputs_are_not_free() -> None:
    ids = channels()
    ids.unify(np.repeat(CONVOLUTION[0][:, 0], 4), CONVOLUTION[0].reshape(-1))
    _, found = blocks_of(ids)
    assert (found.block[:2] >= 0).all()


def test_the_fewest_cells_that_take_evenly_are_a_block() -> None:
    _, found = blocks_of(channels())
    inputs, outputs = found.block[:8], found.block[8:]
    assert len(set(inputs.tolist())) == 1 == len(set(outputs.tolist()))
    assert inputs[0] != outputs[0]
    assert len(set(found.cell[:4].tolist())) == 1 == len(set(found.cell[4:8].tolist()))
    assert found.cell[0] != found.cell[4]
    assert (found.share == 1).all()


def test_cells_that_cannot_take_evenly_lose_the_same_fraction() -> None:
    ids = channels()
    ids.unify(np.array([4, 6]), np.array([5, 7]))
    table, found = blocks_of(ids)
    units = np.unique(table.unit_of[:6])  # 0 to 3, and two pairs
    assert found.share[units].tolist() == [2, 2, 2, 2, 1, 1]
    assert len(set(found.block[units].tolist())) == 1


def test_units_that_may_not_go_are_in_no_choice_of_cells() -> None:
    classes = channels().solve()
    table = UnitTable(classes, [CONVOLUTION], np.zeros(16, bool))
    usable = table.named.copy()
    usable[[4, 5, 6, 7]] = False
    found = find_blocks(table, [CONVOLUTION], usable)
    assert found.block[0] != found.block[8]
    assert (found.share == 1).all()


def test_even_sets_come_small_first_and_are_even_on_every_side() -> None:
    one_side = np.array([[1, 0], [0, 1], [0, 2], [2, 0]])
    assert even_sets([one_side])[:3] == [[0, 1], [2, 3], [0, 1, 2, 3]]
    assert even_sets([one_side, np.array([[1, 0], [0, 2], [0, 1], [2, 0]])])[0] == [0, 1, 2, 3]
    assert even_sets([np.zeros((13, 2), np.int64)]) == []


def test_fractions_are_the_smallest_whole_ones() -> None:
    assert equal_fractions([6, 4]) == [3, 2]
    assert equal_fractions([]) == []


def test_a_step_of_equal_fractions_is_made_of_the_fewest_units_that_take_evenly() -> None:
    inputs = np.array([[0, 1], [1, 0], [1, 0], [0, 1]])  # 24, 88, 12 and 76 channels, a concatenation and its writer
    outputs = np.array([[0, 0], [1, 0], [0, 1], [0, 1]])
    found = even_parts([inputs, outputs], [6, 22, 3, 19])
    assert sorted(map(tuple, found.tolist())) == [(0, 1, 0, 1)] * 19 + [(2, 1, 1, 0)] * 3
    assert found.sum(0).tolist() == [6, 22, 3, 19]
    assert all((part @ inputs)[0] == (part @ inputs)[1] for part in found)


def test_a_step_that_takes_unevenly_or_of_too_many_cells_has_one_part() -> None:
    assert even_parts([np.array([[1, 0], [0, 1]])], [1, 2]).tolist() == [[1, 2]]
    assert even_parts([np.zeros((13, 2), np.int64)], [2] * 13).tolist() == [[2] * 13]
