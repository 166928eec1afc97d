"""Removal on random networks over images: exact, and no less goes than the table says."""

from __future__ import annotations

import pytest

from tests.fxprune.channels.exactness import check_network
from tests.fxprune.channels.parameters_left import IMAGES, IMAGES_SHARE, QUICK_IMAGES


@pytest.mark.parametrize("seed", QUICK_IMAGES)
def test_a_random_network_over_images_is_shrunk_exactly(seed: int) -> None:
    assert check_network(seed, words=False)[1] <= IMAGES[seed]


@pytest.mark.slow
@pytest.mark.parametrize("seed", sorted({*range(len(IMAGES))}.difference(QUICK_IMAGES)))
def test_another_random_network_is_shrunk_exactly(seed: int) -> None:
    assert check_network(seed, words=False)[1] <= IMAGES[seed]


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 2000, 50))
def test_many_more_random_networks_are_shrunk_exactly(first: int) -> None:
    counts = [check_network(seed, words=False) for seed in range(first, first + 50)]
    assert sum(left for _, left in counts) <= IMAGES_SHARE * sum(before for before, _ in counts)
