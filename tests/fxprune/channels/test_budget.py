"""Ladders and stairs: in which order units go, rounded, and what uses a budget up."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from fxprune.channels.budget import Ladder, Rounding, Staircase, ladders
from fxprune.channels.groups import ChannelGroup
from fxprune.errors import ArgumentError, PruningError

Units = NDArray[np.int64]


def group(
    units: Units, *, macs: int = 1, kind: str = "channel", aligned: bool = False, block: int = -1
) -> ChannelGroup:
    zeros, ones = np.zeros(len(units), np.int64), np.ones(len(units), np.int64)
    return ChannelGroup("w", "channel", len(units), (), macs, 1, 0, None, aligned, units, zeros, ones, block)


def ladder(size: int, to: int | str = 1, *, most: float = 1.0, least: int = 1, lean: float = 0.0) -> Ladder:
    own = group(np.arange(size), aligned=True)
    return Ladder([own], [np.arange(size, dtype=float)], Rounding(to, most, least), lean)


def test_the_lowest_scores_go_first() -> None:
    own = group(np.arange(4))
    assert Ladder([own], [np.array([3.0, 1.0, 2.0, 0.0])], Rounding(1, 1.0, 1)).units[:, 0].tolist() == [3, 1, 2, 0]


@pytest.mark.parametrize(
    ("found", "taken"),
    [
        (ladder(8), [1, 2, 3, 4, 5, 6, 7, 7]),
        (ladder(8, 4), [0, 0, 4, 4, 4, 4, 4, 4]),
        (ladder(8, 4, lean=-1.0), [4, 4, 4, 4, 4, 4, 4, 4]),
        (ladder(8, 4, lean=1.0), [0, 0, 0, 0, 0, 0, 4, 4]),
        (ladder(8, most=0.5), [1, 2, 3, 4, 4, 4, 4, 4]),
        (ladder(8, least=6), [1, 2, 2, 2, 2, 2, 2, 2]),
        (ladder(8, "auto"), [0] * 8),
        (ladder(8, "fine"), [0, 0, 4, 4, 4, 4, 4, 4]),
    ],
)
def test_steps_are_rounded_so_that_multiples_stay(found: Ladder, taken: list[int]) -> None:
    assert found.taken.tolist() == taken


def test_cells_lose_their_share_at_a_time() -> None:
    ones = group(np.arange(4), block=0)
    pairs = group(np.array([4, 5]), block=0)
    cells = [np.full(4, 1), np.full(2, 2)]
    vars(ones).update(cells=cells[0], share=np.full(4, 2))
    vars(pairs).update(cells=cells[1])
    found = Ladder([ones, pairs], [np.array([1.0, 4, 2, 3]), np.array([2.0, 1])], Rounding(1, 1.0, 1))
    assert [sorted(row) for row in found.units.tolist()] == [[0, 2, 5], [1, 3, 4]]


def stairs(scope: str, *scores: list[float], macs: list[int] | None = None) -> tuple[Staircase, Callable[[Units], int]]:
    """Groups of consecutive units, and what is left of the MACs of one for each unit, or of as many as a group says."""
    starts = np.cumsum([0, *map(len, scores)])
    each = macs or [1] * len(scores)
    groups = [group(np.arange(start, start + len(s))) for start, s in zip(starts, scores, strict=False)]
    cost = np.repeat(each, [len(s) for s in scores])
    found = Staircase(ladders(groups, [np.array(s) for s in scores], 1, 1.0, 1), scope)
    return found, lambda units: int(cost.sum() - cost[units].sum())


def test_a_global_order_is_by_score_and_a_local_one_by_share() -> None:
    scores = [0.0, 1.0, 2.0], [3.0, 4.0, 5.0]
    assert stairs("global", *scores)[0].units(2).tolist() == [0, 1]
    assert stairs("local", *scores)[0].units(2).tolist() == [0, 3]


def test_every_choice_holds_the_one_before() -> None:
    found, _ = stairs("global", [0.5, 0.1, 0.9], [0.2, 0.3, 0.4, 0.8])
    choices = [set(found.units(n).tolist()) for n in range(len(found) + 1)]
    assert all(a < b for a, b in itertools.pairwise(choices))
    assert found.total == 7
    assert len(found) == 5  # one of each group stays


def test_search_gives_the_fewest_stairs_that_fit() -> None:
    found, left = stairs("global", [0.0, 1.0, 2.0], [3.0, 4.0, 5.0])
    assert found.search(lambda units: left(units) <= 3) == 3
    assert found.search(lambda units: left(units) <= 1) is None


def test_a_last_stair_that_takes_too_much_gives_way_to_one_of_a_like_score() -> None:
    found, left = stairs("global", [0.5, 1.0], [0.7, 3.0], macs=[5, 2])
    assert sorted(found.units(1).tolist()) == [0]
    assert found.fill(1, left, limit=12).tolist() == [2]  # 12 of 14 are left, not 9
    found, left = stairs("global", [0.5, 1.0], [1.2, 3.0], macs=[5, 2])
    assert found.fill(1, left, limit=12).tolist() == [0]  # 1.2 is more than half as much again as 0.5


def test_stairs_that_need_not_be_taken_are_given_back() -> None:
    found, left = stairs("global", [0.5, 1.0], [0.6, 3.0], macs=[2, 5])
    assert found.units(2).tolist() == [0, 2]
    assert found.fill(2, left, limit=9).tolist() == [2]


def test_scores_that_are_not_finite_and_multiples_that_are_too_large_are_refused() -> None:
    with pytest.raises(PruningError, match="NaN or inf"):
        ladders([group(np.arange(2))], [np.array([0.0, np.nan])], 1, 1.0, 1)
    with pytest.raises(ArgumentError, match="round_to=4 is more than the 2 units"):
        ladders([group(np.arange(2))], [np.zeros(2)], 4, 1.0, 1)
