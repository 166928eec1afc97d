"""Ladders and stairs: in which order units go, rounded, and what uses a budget up."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from fxprune.channels.budget import Ladder, Rounding, ladders
from fxprune.channels.groups import ChannelGroup
from fxprune.channels.stairs import Limit, Staircase
from fxprune.errors import ArgumentError, PruningError

Units = NDArray[np.int64]


def group(
    units: Units, *, macs: int = 1, kind: str = "channel", aligned: bool = False, block: int = -1
) -> ChannelGroup:
    zeros, ones = np.zeros(len(units), np.int64), np.ones(len(units), np.int64)
    return ChannelGroup(
        "w", "channel", len(units), (), macs, 1, 0, None, aligned, units, zeros, ones, ones[:, None], block
    )


def ladder(size: int, to: int | str = 1, *, most: float = 1.0, least: int = 1, lean: float = 0.0) -> Ladder:
    own = group(np.arange(size), aligned=True)
    return Ladder([own], [np.arange(size, dtype=float)], [Rounding(to, most, least)], lean)


def test_the_lowest_scores_go_first() -> None:
    own = group(np.arange(4))
    assert Ladder([own], [np.array([3.0, 1.0, 2.0, 0.0])], [Rounding(1, 1.0, 1)]).units[:, 0].tolist() == [3, 1, 2, 0]


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
    assert [own.tolist() for own in found.taken] == [taken]


def test_a_finer_rounding_goes_on_where_a_coarser_one_ends() -> None:
    own = group(np.arange(8), aligned=True)
    found = Ladder([own], [np.arange(8, dtype=float)], [Rounding(to, 1.0, 1) for to in (4, 1)])
    assert [taken.tolist() for taken in found.taken] == [[0, 0, 4, 4, 4, 4, 4, 4], [4, 4, 4, 4, 5, 6, 7, 7]]
    assert found.most == 7


def test_cells_lose_their_share_at_a_time() -> None:
    ones = group(np.arange(4), block=0)
    pairs = group(np.array([4, 5]), block=0)
    cells = [np.full(4, 1), np.full(2, 2)]
    vars(ones).update(cells=cells[0], share=np.full(4, 2), parts=np.full((4, 1), 2))
    vars(pairs).update(cells=cells[1])
    found = Ladder([ones, pairs], [np.array([1.0, 4, 2, 3]), np.array([2.0, 1])], [Rounding(1, 1.0, 1)])
    assert [sorted(row) for row in found.units.tolist()] == [[0, 2, 5], [1, 3, 4]]


def stairs(
    scope: str,
    *scores: list[float],
    macs: list[int] | None = None,
    round_to: tuple[int, ...] = (1,),
    blocked: tuple[bool, ...] = (),
) -> tuple[Staircase, Callable[[Units], int]]:
    """Groups of consecutive units, and what is left of the MACs of one for each unit, or of as many as a group says."""
    starts = np.cumsum([0, *map(len, scores)])
    each = macs or [1] * len(scores)
    groups = [group(np.arange(start, start + len(s))) for start, s in zip(starts, scores, strict=False)]
    for own, is_blocked in zip(groups, blocked, strict=False):
        vars(own).update(blocked=is_blocked, aligned=True)
    cost = np.repeat(each, [len(s) for s in scores])
    found = Staircase(ladders(groups, [np.array(s) for s in scores], round_to, 1.0, 1), scope)
    return found, lambda units: int(cost.sum() - cost[units].sum())


def test_a_global_order_is_by_score_and_a_local_one_by_share() -> None:
    scores = [0.0, 1.0, 2.0], [3.0, 4.0, 5.0]
    assert stairs("global", *scores)[0].units(2).tolist() == [0, 1]
    assert stairs("local", *scores)[0].units(2).tolist() == [0, 3]


def test_every_choice_holds_the_one_before() -> None:
    found, _ = stairs("global", [0.5, 0.1, 0.9], [0.2, 0.3, 0.4, 0.8])
    choices = [set(found.units(n).tolist()) for n in range(len(found) + 1)]
    assert all(a < b for a, b in itertools.pairwise(choices))
    assert len(found) == 5  # one of each group stays


def test_search_gives_the_fewest_stairs_that_fit() -> None:
    found, left = stairs("global", [0.0, 1.0, 2.0], [3.0, 4.0, 5.0])
    assert found.search(lambda units: left(units) <= 3) == 3
    assert found.search(lambda units: left(units) <= 1) is None


def landed(found: Staircase, left: Callable[[Units], int], most: float, spent: float = 0.98) -> list[int]:
    units = found.land(Limit(left, most, spent))
    assert units is not None
    assert left(units) <= most
    return sorted(units.tolist())


def test_whole_blocks_stay_where_they_use_a_limit_up() -> None:
    found, left = stairs("global", [*map(float, range(32))], round_to=(16, 1))
    assert landed(found, left, 16, 0.97) == list(range(16))


@pytest.mark.parametrize(("limit", "gone"), [(24.2, 8), (20.1, 12), (22.9, 10)])
def test_the_last_block_is_cut_by_the_coarsest_multiple_that_uses_a_limit_up(limit: float, gone: int) -> None:
    found, left = stairs("global", [*map(float, range(32))], round_to=(16, 1))
    assert landed(found, left, limit, 0.95) == list(range(gone))


def test_a_last_stair_that_takes_too_much_gives_way_to_one_of_a_like_score() -> None:
    found, left = stairs("global", [0.5, 1.0], [0.7, 3.0], macs=[5, 2])
    assert found.units(1).tolist() == [0]
    assert landed(found, left, 12) == [2]  # 12 of 14 are left, not 9


def test_stairs_that_need_not_be_taken_are_given_back() -> None:
    found, left = stairs("global", [0.5, 1.0], [0.6, 3.0], macs=[2, 5])
    assert found.units(2).tolist() == [0, 2]
    assert landed(found, left, 9) == [2]


def test_where_a_convolution_reads_the_last_block_channels_that_none_reads_are_cut_finer() -> None:
    def lands(*blocked: bool) -> list[int]:
        scores = [*map(float, range(48))], [*map(float, range(100, 148))]
        found, left = stairs("global", *scores, round_to=(16, 1), blocked=blocked)
        gone = np.array(landed(found, left, 70.5))
        return [int((gone < 48).sum()), int((gone >= 48).sum())]

    assert lands(False, False) == [26, 0]
    assert lands(True, False) == [24, 2]
    assert lands(False, True) == [26, 0]


def test_a_block_that_an_earlier_budget_has_begun_goes_before_all_others() -> None:
    def first(started: bool) -> list[int]:
        groups = [group(np.arange(start, start + 32)) for start in (0, 32)]
        vars(groups[1]).update(blocked=True)
        gone = [np.zeros(32, bool), np.arange(32) < 3]
        scores = [np.linspace(0, 1, 32), np.linspace(1, 2, 32)]
        found = ladders(groups, scores, (16, 1), 1.0, 1, gone=gone, started=[started, started])
        return Staircase(found, "global").units(1).tolist()

    assert first(started=True) == list(range(32, 48))
    assert first(started=False) == list(range(16))


def test_what_is_gone_goes_first_and_leaves_the_order_of_the_others() -> None:
    own, scores = group(np.arange(4)), np.array([3.0, 1.0, 2.0, 0.0])
    found = Ladder([own], [scores], [Rounding(1, 1.0, 1)], gone=[np.array([True, False, True, False])])
    assert found.units[:, 0].tolist() == [2, 0, 3, 1]
    assert found.scores.tolist() == [0, 0, 0, 1]


def test_no_choice_is_made_where_all_stairs_leave_too_much() -> None:
    found, left = stairs("global", [0.0, 1.0, 2.0])
    assert found.land(Limit(left, 0, 0.98)) is None


def test_scores_that_are_not_finite_and_multiples_that_are_too_large_are_refused() -> None:
    with pytest.raises(PruningError, match="NaN or inf"):
        ladders([group(np.arange(2))], [np.array([0.0, np.nan])], 1, 1.0, 1)
    with pytest.raises(ArgumentError, match="round_to=4 is more than the 2 units"):
        ladders([group(np.arange(2))], [np.zeros(2)], 4, 1.0, 1)
