"""Which weights are not zero, a bit each: compared with a boolean for each."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fxprune.channels.used_weights import UsedWeights, slices_with_weights
from fxprune.graph import working_memory


@pytest.mark.parametrize("shape", [(1, 6, 17, 1), (3, 4, 8, 9), (5, 1, 1, 9), (2, 3, 0, 1), (0, 2, 3, 1), (1, 0, 3, 1)])
@pytest.mark.parametrize("bytes_at_once", [1, 160, 2**22])
def test_bits_say_what_booleans_do(shape: tuple[int, ...], bytes_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working_memory, "BYTES_AT_ONCE", bytes_at_once)
    torch.manual_seed(0)
    table = torch.randn(shape).where(torch.rand(shape) < 0.2, 0)
    expected = (table != 0).any(-1).numpy()
    groups, rows, columns = expected.shape
    draw = np.random.default_rng(0)
    asked_rows, asked_columns = draw.random((groups, rows)) < 0.5, draw.random((groups, columns)) < 0.5
    for used in (UsedWeights.of_table(table), UsedWeights.of(expected)):
        assert used.bits.nbytes == groups * rows * -(-columns // 8)
        assert np.array_equal(used.columns_of_rows(), expected.any(1))
        assert np.array_equal(used.columns_of_rows(asked_rows), (expected & asked_rows[:, :, None]).any(1))
        assert np.array_equal(used.rows_with(), expected.any(2))
        assert np.array_equal(used.rows_with(asked_columns), (expected & asked_columns[:, None]).any(2))
        for group in range(groups):
            found = used.columns_of(group, asked_rows[group])
            assert np.array_equal(found, expected[group][asked_rows[group]].any(0))


def test_a_nan_and_the_smallest_number_are_weights_and_minus_zero_is_none() -> None:
    table = torch.tensor([float("nan"), 5e-324, -0.0, 0.0], dtype=torch.float64).reshape(1, 1, 4, 1)
    assert UsedWeights.of_table(table).columns_of_rows().tolist() == [[True, True, False, False]]
    assert UsedWeights.of_table(table[:, :, 2:]).rows_with().tolist() == [[False]]


@pytest.mark.parametrize("shape", [(6,), (9, 5), (1, 7), (7, 1), (4, 3, 3, 2), (0, 3), (3, 0)])
@pytest.mark.parametrize("bytes_at_once", [1, 80, 2**22])
def test_slices_with_weights_are_those_of_which_not_all_is_zero(
    shape: tuple[int, ...], bytes_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(working_memory, "BYTES_AT_ONCE", bytes_at_once)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).round()
    for axis in range(len(shape)):
        rows = weight.movedim(axis, 0).reshape(shape[axis], -1 if weight.numel() else 0)
        assert slices_with_weights(weight, axis).tolist() == [bool(row.count_nonzero()) for row in rows]
