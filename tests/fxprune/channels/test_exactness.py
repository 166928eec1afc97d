"""What the tests of removal compare by refuses what would pass unseen."""

from __future__ import annotations

import pytest
import torch

from tests.fxprune.channels.exactness import error

ONES = torch.ones(2, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    "got",
    [ONES * float("nan"), ONES * float("inf"), ONES[:1], ONES.float(), torch.ones(3, 2, dtype=torch.float64)],
    ids=["nan", "inf", "broadcasts", "float32", "transposed"],
)
def test_outputs_that_are_no_finite_tensor_of_the_same_kind_are_refused(got: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        error(ONES, got)
    with pytest.raises(AssertionError):
        error(got, ONES)


def test_structures_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        error((ONES, ONES), (ONES,))


def test_the_difference_is_relative_to_what_is_expected() -> None:
    assert error({"a": 4 * ONES, "b": ONES}, {"a": 5 * ONES, "b": ONES}) == pytest.approx(0.25)
    assert error(torch.arange(3), torch.arange(3)) == 0
    with pytest.raises(AssertionError):
        error(torch.arange(3), torch.arange(1, 4))
