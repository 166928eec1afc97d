"""Calls that are repeated find what they were given as it was at first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxprune.artifacts.repeated_calls import RepeatedCall


def _counting(data: Tensor) -> Tensor:
    data += 1
    return data.clone()


def test_tensors_that_are_written_into_are_as_they_were() -> None:
    call = RepeatedCall(_counting, (torch.zeros(3),), {})
    assert [call().tolist() for _ in range(3)] == [[1.0, 1.0, 1.0]] * 3


@pytest.mark.parametrize("kind", ["empty", "filled", "static", "pair"])
def test_caches_are_as_they_were(kind: str, transformers: Any) -> None:
    keys, values = torch.randn(2, 2, 1, 4, 3).unbind()
    cache = transformers.DynamicCache()
    if kind == "static":
        config = transformers.LlamaConfig(num_hidden_layers=1, num_attention_heads=1, head_dim=3)
        cache = transformers.StaticCache(config=config, max_cache_len=8)
    if kind == "pair":
        cache = transformers.EncoderDecoderCache(cache, transformers.DynamicCache())
    if kind in ("filled", "static"):
        cache.update(keys, values, 0)

    def grow(cache: Any) -> tuple[Tensor, Tensor]:
        cache = cache.self_attention_cache if kind == "pair" else cache
        found: tuple[Tensor, Tensor] = cache.update(keys + 1, values, 0)
        return found[0].clone(), found[1].clone()

    call = RepeatedCall(grow, (), {"cache": cache})
    first, second = call(), call()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert cache.get_seq_length() == (8 if kind in ("filled", "static") else 4)  # the last call's
