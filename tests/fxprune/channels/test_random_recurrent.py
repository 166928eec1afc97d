"""Removal on random networks of recurrent layers and cells: exact, and as much goes as can."""

from __future__ import annotations

import pytest

from tests.fxprune.channels.exactness import check
from tests.random_recurrent import recurrent_network

# how many parameters at most are left, by seed: who makes the analysis find more lowers the numbers
PARAMETERS = (727, 410, 2800, 674, 469, 651, 214, 1439, 394, 359, 189, 488)
LEFT = 0.65  # of the parameters of fifty networks, which the seeds make differ by a tenth


@pytest.mark.parametrize("seed", range(len(PARAMETERS)))
def test_a_random_recurrent_network_is_shrunk_exactly(seed: int) -> None:
    assert check(seed, *recurrent_network(seed))[1] <= PARAMETERS[seed]


@pytest.mark.slow
@pytest.mark.parametrize("first", range(100, 400, 50))
def test_many_more_are_shrunk_exactly(first: int) -> None:
    counts = [check(seed, *recurrent_network(seed)) for seed in range(first, first + 50)]
    assert sum(left for _, left in counts) <= LEFT * sum(before for before, _ in counts)
