"""Removal on random networks over tokens: exact, and no less goes than the table says."""

from __future__ import annotations

import pytest

from tests.fxprune.channels.exactness import check_network
from tests.fxprune.channels.parameters_left import QUICK_TOKENS, TOKENS, TOKENS_SHARE


@pytest.mark.parametrize("seed", QUICK_TOKENS)
def test_a_random_network_over_tokens_is_shrunk_exactly(seed: int) -> None:
    assert check_network(seed, words=True)[1] <= TOKENS[seed]


@pytest.mark.slow
@pytest.mark.parametrize("seed", sorted({*range(len(TOKENS))}.difference(QUICK_TOKENS)))
def test_another_random_network_is_shrunk_exactly(seed: int) -> None:
    assert check_network(seed, words=True)[1] <= TOKENS[seed]


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 2000, 50))
def test_many_more_random_networks_are_shrunk_exactly(first: int) -> None:
    counts = [check_network(seed, words=True) for seed in range(first, first + 50)]
    assert sum(left for _, left in counts) <= TOKENS_SHARE * sum(before for before, _ in counts)
