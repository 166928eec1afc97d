"""Removal on random networks with a stream that is normalized: exact in both modes, and most of what is dead goes."""

from __future__ import annotations

import pytest
import torch

import fxprune
from tests.fxprune.channels.exactness import EXACT, check, error
from tests.random_streams import streams

SHARE = 0.62  # of the parameters, left of fifty networks together


@pytest.mark.parametrize("seed", range(16))
def test_a_random_stream_is_shrunk_exactly(seed: int) -> None:
    check(seed, *streams(seed))


@pytest.mark.parametrize("seed", range(3))
def test_the_train_graph_of_a_random_stream_computes_the_same(seed: int) -> None:
    model, inputs = streams(seed)
    final = fxprune.finalize(fxprune.trace(model, (inputs(2),)), align=1).train()
    model.train()
    for batch in (1, 4):
        x = inputs(batch)
        with torch.no_grad():
            assert error(model(x), final(x)) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("first", range(100, 600, 50))
def test_many_more_random_streams_are_shrunk_exactly(first: int) -> None:
    counts = [check(seed, *streams(seed)) for seed in range(first, first + 50)]
    assert sum(left for _, left in counts) <= SHARE * sum(before for before, _ in counts)
