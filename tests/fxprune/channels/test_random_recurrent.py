"""Removal on random networks of recurrent layers and cells: exact, and as much goes as can."""

from __future__ import annotations

import pytest

from tests.fxprune.channels.exactness import check
from tests.random_recurrent import recurrent_network

# how many parameters at most are left, by seed: who makes the analysis find more lowers the numbers
PARAMETERS = (727, 410, 2800, 674, 469, 651, 214, 1439, 394, 359, 189, 488)
LEFT = {100: 0.613, 150: 0.618, 200: 0.624, 250: 0.673, 300: 0.672, 350: 0.668}  # of the parameters, by first of fifty


@pytest.mark.parametrize("seed", range(len(PARAMETERS)))
def test_a_random_recurrent_network_is_shrunk_exactly(seed: int) -> None:
    assert check(seed, *recurrent_network(seed))[1] <= PARAMETERS[seed]


@pytest.mark.slow
@pytest.mark.parametrize("first", LEFT)
def test_many_more_are_shrunk_exactly(first: int) -> None:
    counts = [check(seed, *recurrent_network(seed)) for seed in range(first, first + 50)]
    assert sum(left for _, left in counts) <= LEFT[first] * sum(before for before, _ in counts)
