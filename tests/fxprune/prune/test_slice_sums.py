"""Scores of slices have the same bits, however the rows of a weight are divided."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxprune.graph import working_memory
from fxprune.prune import slice_sums
from fxprune.prune.slice_sums import SliceSums

SHAPES = [(1,), (7,), (1, 5), (2, 1), (3, 129), (64, 3), (65, 17), (130, 33), (257, 20, 3, 3), (77, 5, 1, 7), (1000, 2)]
ORDERS = [None, 1.0, 2.0, math.inf]


def _cut(places: list[int]) -> Callable[[Tensor, Callable[[Tensor, int], Any]], list[Any]]:
    """As `asked`, of a tensor whose rows are divided at these places; a process may have one row, or none."""

    def asked(values: Tensor, function: Callable[[Tensor, int], Any]) -> list[Any]:
        ends = [0, *sorted(min(place, len(values)) for place in places), len(values)]
        pairs = [(start, end) for start, end in itertools.pairwise(ends) if end > start]
        return [function(values[start:end].clone(), start) for start, end in pairs]

    return asked


def _values(shape: tuple[int, ...], seed: int) -> Tensor:
    """Of such different magnitudes that sums depend on the order of what is added."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-8, 9, shape, generator=generator)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_cut_changes_a_bit(order: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    score = SliceSums(order)
    for seed, shape in enumerate(SHAPES):
        values = _values(shape, seed).to(dtype)
        want = [score.along(values, axis) for axis in range(len(shape))]
        for places in ([1], [2], [64], [63, 65], [1, 2, 3], [shape[0] // 2], [5, 5, 90, 200], [*range(1, shape[0], 7)]):
            with monkeypatch.context() as patch:
                patch.setattr(slice_sums, "asked", _cut(places))
                for axis, one in enumerate(want):
                    assert torch.equal(score.along(values, axis), one), (shape, axis, places)


@pytest.mark.parametrize("order", ORDERS)
def test_rows_that_are_summed_in_several_parts_have_the_same_bits(
    order: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, shape in enumerate(SHAPES):
        values = _values(shape, seed)
        want = SliceSums(order).along(values, 0)
        for bytes_at_once in (1, 400, values.nbytes):
            monkeypatch.setattr(working_memory, "BYTES_AT_ONCE", bytes_at_once)
            assert torch.equal(SliceSums(order).along(values, 0), want), (shape, bytes_at_once)
        monkeypatch.undo()


def test_a_plain_sum_of_sums_would_have_other_bits() -> None:
    values = _values((130, 33), 7)
    assert not torch.equal(values.square().sum(0), values[:50].square().sum(0) + values[50:].square().sum(0))


@pytest.mark.parametrize("order", ORDERS)
def test_they_are_the_sums_of_each_slice(order: float | None) -> None:
    for seed, shape in enumerate(SHAPES):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        for axis in range(len(shape)):
            slices = values.double().movedim(axis, 0).reshape(shape[axis], -1)
            of_order = {None: slices.sum(1), 1.0: slices.abs().sum(1), 2.0: slices.square().sum(1)}
            want = of_order.get(order, slices.abs().amax(1))
            scale = slices.square().sum(1) if order == 2.0 else slices.abs().sum(1)
            found = SliceSums(order).along(values, axis)
            assert found.dtype == torch.float32
            assert ((found.double() - want).abs() <= 2e-6 * scale).all(), (shape, axis)


def test_rows_have_the_bits_of_the_norms_of_torch() -> None:
    for seed, shape in enumerate(SHAPES):
        values = _values(shape, seed)
        rows = values.unsqueeze(-1)
        within = tuple(range(1, rows.dim()))
        assert torch.equal(SliceSums(1.0).along(values, 0), torch.linalg.vector_norm(rows, 1.0, dim=within))
        assert torch.equal(SliceSums(2.0).along(values, 0), torch.linalg.vector_norm(rows, 2.0, dim=within).square())


def test_nan_and_inf_are_seen_in_their_slices() -> None:
    values = torch.ones(130, 5)
    values[70, 2], values[129, 4] = torch.nan, torch.inf
    for order in ORDERS:
        found = SliceSums(order).along(values, 1)
        assert found.isnan().tolist() == [False, False, True, False, False]
        assert found.isinf().tolist() == [False, False, False, False, True]
