"""One measure of difference, against numpy; one table of tolerances."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import inf, nan

from fxprune.graph.equality import TOLERANCES, close, difference, error


def test_the_error_is_the_largest_difference_over_the_largest_value() -> None:
    a, b = torch.randn(40, 3), torch.randn(40, 3)
    wanted = np.abs(b.double().numpy() - a.double().numpy()).max() / np.abs(a.double().numpy()).max()
    assert error(a, b) == pytest.approx(wanted, rel=1e-12)
    assert error(a, a) == 0.0


@pytest.mark.parametrize(
    ("reference", "value", "expected"),
    [
        ([1.0, nan], [1.0, nan], 0.0),
        ([1.0, nan], [1.0, 2.0], inf),
        ([1.0, 2.0], [1.0, nan], inf),
        ([1.0, inf], [1.0, inf], 0.0),
        ([1.0, inf], [1.0, -inf], inf),
        ([2.0, inf], [1.0, inf], 0.5),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [0.0, 1e-20], inf),
        ([], [], 0.0),
    ],
)
def test_nan_inf_and_zero(reference: list[float], value: list[float], expected: float) -> None:
    assert error(torch.tensor(reference), torch.tensor(value)) == expected


def test_integers_are_equal_or_not() -> None:
    large = torch.tensor([2**60])
    assert error(large, large + 1) == 1.0  # float64 holds neither
    assert error(large, large) == 0.0
    assert not difference(large, large + 1).equal
    assert close(torch.tensor([True]), torch.tensor([True]))
    assert not close(torch.tensor([True]), torch.tensor([False]))


def test_complex_values_are_compared_as_such() -> None:
    a = torch.tensor([3 + 4j])
    assert error(a, a + 1j) == pytest.approx(1 / 5)


def test_other_shapes_are_far_apart_and_what_is_no_tensor_is_not_compared() -> None:
    assert error(torch.ones(2), torch.ones(1)) == inf
    assert error(torch.ones(2), None) == inf
    assert error(3, 4) == 0.0


def test_how_many_places_differ_is_counted() -> None:
    found = difference(torch.tensor([1.0, nan, inf, 4.0]), torch.tensor([1.0, 0.0, inf, inf]))
    assert (found.misplaced, found.scale, found.equal) == (2, 4.0, False)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_each_type_has_room_for_its_rounding_and_not_for_a_wrong_value(dtype: torch.dtype) -> None:
    a = torch.linspace(0.5, 1, 100).to(dtype)
    rounding = torch.finfo(dtype).eps
    assert close(a, a * (1 + rounding))
    assert not close(a, a * 1.2)
    assert not close(a, a * (1 + rounding), tolerance=0.0)
