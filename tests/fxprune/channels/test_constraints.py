"""The solver, and each constraint by itself: what it keeps, what it leaves, and why."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import fx, nn
from torch.nn import functional as F

from fxprune.channels.constraints import (
    Demand,
    EqualGroups,
    Grids,
    Multiples,
    NonEmptyAxes,
    Representatives,
    greedy_cover,
    representative,
)
from fxprune.channels.ids import Ids, Mask
from fxprune.channels.readers import Reader
from fxprune.channels.reasons import Pinned, ReadBy, Structural
from fxprune.channels.solver import Constraint, State
from fxprune.channels.used_weights import UsedWeights

from .exactness import error, shrink


def vector(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, np.int64)


def mask(count: int, *alive: int) -> Mask:
    found = np.zeros(count, bool)
    found[list(alive)] = True
    return found


def settled(constraints: Sequence[Constraint], alive: Mask, costs: Sequence[float] | None = None) -> State:
    state = State(alive, np.zeros(len(alive)) if costs is None else np.array(costs))
    state.settle(constraints)
    return state


def kept(state: State) -> list[int]:
    found: list[int] = np.flatnonzero(state.alive).tolist()
    return found


def node(name: str = "conv") -> fx.Node:
    graph = fx.Graph()
    made = graph.create_node("call_function", torch.ops.aten.relu.default, name=name)
    made.meta["nn_module_stack"] = {}
    return made


def reader(used: Any, rows: Any, columns: Any, **facts: Any) -> Reader:
    return Reader(
        node(), None if rows is None else np.array(rows), np.array(columns), UsedWeights.of(np.array(used, bool)),
        **{name: np.array(value) for name, value in facts.items()},
    )  # fmt: skip


def lists(readers: Sequence[Reader]) -> tuple[Sequence[Reader], list[Any], list[Any]]:
    return readers, [r.rows for r in readers], [r.columns for r in readers]


# ---- grids


def grid() -> Grids:
    """Two rows (0, 1), three columns (2, 3, 4), positions 5 to 10."""
    ids = Ids()
    ids.product(ids.fresh(2), ids.fresh(3))
    return Grids(ids.solve())


def test_a_position_keeps_its_factors_and_these_all_positions_between_them() -> None:
    assert kept(settled([grid()], mask(11, 6, 10))) == [0, 1, 3, 4, 6, 7, 9, 10]


def test_a_factor_without_the_other_keeps_no_position() -> None:
    state = settled([grid()], mask(11, 0, 1))
    assert kept(state) == [0, 1]
    assert state.kept == 0


def test_what_a_grid_keeps_says_so() -> None:
    assert settled([grid()], mask(11, 6)).why(3) is Structural.GRID


def test_grids_close_as_classes_do() -> None:
    ids = Ids()
    outer = ids.product(ids.fresh(2), ids.fresh(2))
    ids.product(outer, ids.fresh(2))
    classes = ids.solve()
    for alive in itertools.product([False, True], repeat=6):
        start = np.zeros(classes.count, bool)
        start[classes.count - 6 :] = alive
        expected = start.copy()
        classes.close(expected)
        assert settled([Grids(classes)], start).alive.tolist() == expected.tolist()


# ---- demand


def test_rows_that_are_alive_keep_the_columns_that_they_use() -> None:
    one = reader([[[1, 0, 0], [0, 1, 0]]], [[0, 1]], [[2, 3, 4]])
    state = settled([Demand(*lists([one]), 5)], mask(5, 0))
    assert kept(state) == [0, 2]
    assert state.why(2) == ReadBy(one.node)


def test_columns_that_fold_or_merge_are_not_kept() -> None:
    one = reader([[[1, 1]]], [[0]], [[1, 2]], soft=[[True, False]])
    assert kept(settled([Demand(*lists([one]), 3)], mask(3, 0))) == [0, 2]


def test_a_reader_without_rows_always_reads() -> None:
    one = reader([[[1, 0]]], None, [[0, 1]])
    assert kept(settled([Demand(*lists([one]), 2)], mask(2))) == [0]


def test_groups_read_their_own_columns() -> None:
    one = reader([[[1, 1]], [[1, 1]]], [[0], [1]], [[2, 3], [4, 5]])
    assert kept(settled([Demand(*lists([one]), 6)], mask(6, 1))) == [1, 4, 5]


def test_demand_goes_back_through_a_long_chain_in_one_sweep() -> None:
    chain = [reader([[[1]]], [[i + 1]], [[i]]) for i in range(2000)]
    demand = Demand(*lists(chain), 2001)
    state = State(mask(2001, 2000), np.zeros(2001))
    assert demand.meet(state)
    assert state.alive.all()
    assert not demand.meet(state)


# ---- representatives


def merging(constants: Sequence[float], column: int = 1) -> Reader:
    """One row, class 0, that reads merging constants of the classes from `column` on."""
    n = len(constants)
    columns = np.arange(column, column + n)[None]
    facts = {"soft": [[True] * n], "merges": [[True] * n], "constant": [constants]}
    return reader([[[1] * n]], [[0]], columns, **facts)


def test_constants_that_merge_keep_one_column() -> None:
    one = merging([0.5, 0.5])
    state = settled([Representatives(*lists([one]), 3)], mask(3, 0))
    assert kept(state) == [0, 1]
    assert state.why(1) is Structural.REPRESENTATIVE


def test_a_column_that_is_alive_represents_the_others() -> None:
    assert kept(settled([Representatives(*lists([merging([0.5, 0.5])]), 3)], mask(3, 0, 2))) == [0, 2]


def test_nothing_is_kept_for_rows_that_are_dead() -> None:
    assert kept(settled([Representatives(*lists([merging([0.5, 0.5])]), 3)], mask(3))) == []


def test_a_column_that_serves_two_readers_is_preferred() -> None:
    readers = [merging([1.0, 1.0]), merging([1.0, 1.0], column=2)]
    assert kept(settled([Representatives(*lists(readers), 4)], mask(4, 0))) == [0, 2]


def test_tiny_constants_represent_nothing() -> None:
    one = merging([1e-6, 1.0])
    assert representative(one, 0, np.array([True, False])) is None
    assert representative(one, 0, np.array([True, True])) == 1
    assert kept(settled([Representatives(*lists([one]), 3)], mask(3, 0, 1))) == [0, 1, 2]


def test_the_greedy_cover_is_that_of_counting_anew_every_time() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        sets = [np.unique(random.integers(12, size=random.integers(1, 5))) for _ in range(20)]
        left, expected = list(sets), []
        while left:
            expected.append(int(np.bincount(np.concatenate(left)).argmax()))
            left = [s for s in left if expected[-1] not in s]
        assert greedy_cover(sets).tolist() == expected


# ---- groups of convolutions


def test_groups_are_filled_to_the_largest_with_the_cheapest() -> None:
    pair = np.arange(6).reshape(2, 3), np.arange(6, 8).reshape(2, 1)
    costs = [0, 0, 0, 1, 0, 0.5, 0, 0]
    state = settled([EqualGroups([pair], 8)], mask(8, 0, 1, 6, 7), costs)
    assert kept(state) == [0, 1, 4, 5, 6, 7]
    assert state.why(4) is Structural.BALANCED


def test_a_group_that_is_gone_entirely_stays_gone() -> None:
    pair = np.arange(6).reshape(2, 3), np.arange(6, 8).reshape(2, 1)
    assert kept(settled([EqualGroups([pair], 8)], mask(8, 0, 1, 6))) == [0, 1, 6]


def test_a_group_with_outputs_keeps_an_input() -> None:
    pair = np.arange(6).reshape(2, 3), np.arange(6, 8).reshape(2, 1)
    assert kept(settled([EqualGroups([pair], 8)], mask(8, 6))) == [0, 6]


# ---- axes, counts


def test_an_empty_axis_keeps_its_cheapest_channel() -> None:
    state = settled([NonEmptyAxes([vector(0, 1), vector(2, 3)], 4)], mask(4, 3), [1, 0, 0, 0])
    assert kept(state) == [1, 3]
    assert state.why(1) is Structural.NONEMPTY


def test_counts_are_rounded_up_as_far_as_there_are_channels() -> None:
    state = settled([Multiples([(np.arange(6), 4), (np.arange(6, 9), 2)], [], True, 9)], mask(9, 0, 6, 7, 8))
    assert kept(state) == [0, 1, 2, 3, 6, 7, 8]
    assert state.why(2) is Structural.ALIGNED


def test_rounding_that_would_spread_to_other_channels_is_taken_back() -> None:
    ids = Ids()
    ids.product(ids.fresh(2), ids.fresh(3))
    grids = Grids(ids.solve())
    counts = [(np.arange(5, 11), 4)]  # three positions of the first row; a fourth would keep the second row
    start = mask(11, 0, 2, 3, 4, 5, 6, 7)
    assert settled([grids, Multiples(counts, [grids], False, 11)], start).alive.tolist() == start.tolist()
    assert settled([grids, Multiples(counts, [grids], True, 11)], start).alive.all()


# ---- the solver


def test_what_was_undone_is_dead_again_and_what_followed_it_is_found_again() -> None:
    one = reader([[[1]]], [[0]], [[1]])
    demand = Demand(*lists([one]), 3)
    state = State(mask(3), np.zeros(3))
    state.settle([demand])
    moment = state.mark()
    state.keep(vector(2), Structural.ALIGNED)
    state.undo(moment)
    assert kept(state) == []
    state.keep(vector(0), Structural.ALIGNED)
    state.settle([demand])
    assert kept(state) == [0, 1]


def test_few_dead_classes_and_many_give_the_same() -> None:
    pair = np.arange(40).reshape(2, 20), np.arange(40, 42).reshape(2, 1)
    for dead in ([3], list(range(5))):
        alive = ~mask(42, *dead)
        assert kept(settled([EqualGroups([pair], 42)], alive)) == list(range(42))


def test_reasons_have_texts() -> None:
    assert Pinned(lambda: "the output").text() == "pinned by the output"
    assert "reads it, and it is not constant there" in ReadBy(node("conv")).text()
    assert Structural.NONEMPTY.text() == "the last one of its axis"


class TwoGroupings(nn.Module):
    """One input in groups of two sizes, whose outputs are added: balances over the same classes in two shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.halves, self.quarters = nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 8, 1, groups=4)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(x))
        return self.last(F.relu(self.halves(x) + self.quarters(x)))


@pytest.mark.parametrize("dead", [[0, 1], [0, 4], [0, 2, 4, 6]])
def test_groups_of_two_sizes_over_the_same_channels_both_stay_equal(dead: list[int]) -> None:
    torch.manual_seed(0)
    model = TwoGroupings().double().eval()
    with torch.no_grad():
        for layer in (model.first, model.halves, model.quarters):
            layer.weight[dead] = 0
            layer.bias[dead] = 0  # type: ignore[index]
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    traced, plan = shrink(model, x)
    with torch.no_grad():
        assert error(model(x), traced(x)) < 1e-9
    assert len(plan.kept["first.weight"][0]) == (4 if len(dead) == 4 else 8)
