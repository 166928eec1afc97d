"""Removal on random networks over images."""

from __future__ import annotations

import pytest

from tests.fxprune.channels.exactness import check_network
from tests.random_networks import network


@pytest.mark.parametrize("seed", range(180))
def test_a_random_network_over_images_is_shrunk_exactly(seed: int) -> None:
    check_network(network, seed, words=False)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 2000, 50))
def test_many_more_random_networks_are_shrunk_exactly(first: int) -> None:
    for seed in range(first, first + 50):
        check_network(network, seed, words=False)
