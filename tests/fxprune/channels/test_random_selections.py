"""Removal on random networks that select and share: exact, and no less goes than the table says."""

from __future__ import annotations

import pytest

from tests.fxprune.channels.exactness import check
from tests.fxprune.channels.parameters_left import QUICK_SELECTIONS, SELECTIONS, SELECTIONS_SHARE
from tests.random_networks import network
from tests.selection_networks import SelectionNetwork


@pytest.mark.parametrize("seed", QUICK_SELECTIONS)
def test_a_random_network_that_selects_and_shares_is_shrunk_exactly(seed: int) -> None:
    assert check(seed, *network(seed, kind=SelectionNetwork))[1] <= SELECTIONS[seed]


@pytest.mark.slow
@pytest.mark.parametrize("seed", sorted({*range(len(SELECTIONS))}.difference(QUICK_SELECTIONS)))
def test_another_random_network_that_selects_is_shrunk_exactly(seed: int) -> None:
    assert check(seed, *network(seed, kind=SelectionNetwork))[1] <= SELECTIONS[seed]


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 2000, 50))
def test_many_more_random_networks_that_select_are_shrunk_exactly(first: int) -> None:
    counts = [check(seed, *network(seed, kind=SelectionNetwork)) for seed in range(first, first + 50)]
    assert sum(left for _, left in counts) <= SELECTIONS_SHARE * sum(before for before, _ in counts)
