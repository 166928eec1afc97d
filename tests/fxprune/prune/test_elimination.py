"""The order in which units go, and what makes up for them, against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fxprune.prune.sensitivity import elimination
from fxprune.prune.sensitivity.elimination import Part, removal_order


def part(columns: Tensor, outputs: int, damping: float = 0.0) -> tuple[Part, Tensor]:
    """A part of correlated columns, and its rows, which end with those that damp."""
    count = int(columns.max()) + 1
    mixed = torch.randn(3 * count, count, dtype=torch.float64) @ torch.randn(count, count, dtype=torch.float64)
    rows = torch.cat([mixed, damping**0.5 * torch.eye(count, dtype=torch.float64)])
    weights = torch.randn(outputs, count, dtype=torch.float64)
    energy = float((mixed @ weights.T).square().sum())
    return Part(torch.linalg.inv(rows.T @ rows), weights, columns, energy), rows


def refit(found: Part, rows: Tensor, units: list[int]) -> tuple[Tensor, float]:
    """The weights that least squares finds without the columns of units, and what they lose of the energy."""
    gone = found.columns[units].flatten()
    kept = [column for column in range(rows.shape[1]) if column not in gone[gone >= 0].tolist()]
    target = rows @ found.weights.T
    solution = torch.linalg.lstsq(rows[:, kept], target).solution
    weights = torch.zeros_like(found.weights)
    weights[:, kept] = solution.T
    return weights, float((rows @ weights.T - target).square().sum()) / found.energy


def uneven() -> Tensor:
    """Columns of six units, of which some have fewer than others."""
    return torch.tensor([[0, 1, 2], [3, 4, -1], [5, -1, -1], [6, 7, 8], [9, -1, -1], [10, 11, -1]])


READERS = {
    "one reader": [torch.arange(8)[:, None]],
    "two readers": [torch.arange(8)[:, None], torch.arange(8).flip(0)[:, None]],
    "taps": [torch.arange(24).reshape(6, 4)],
    "taps and a layer": [torch.arange(12).reshape(6, 2), torch.arange(6)[:, None]],
    "units of unequal width": [uneven()],
    "units that a reader has not": [torch.arange(6)[:, None], torch.tensor([[0], [-1], [1], [2], [-1], [3]])],
}


@pytest.mark.parametrize("readers", READERS)
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_at_each_step_the_unit_goes_without_which_least_squares_loses_least(readers: str, damping: float) -> None:
    torch.manual_seed(0)
    made = [part(columns, 3, damping) for columns in READERS[readers]]
    units = len(READERS[readers][0])
    order = removal_order([found for found, _ in made], units)
    gone: list[int] = []
    lost = 0.0
    for unit, loss in zip(order.units[:-1].tolist(), order.losses[:-1].tolist(), strict=True):
        costs = {
            each: sum(refit(found, rows, [*gone, each])[1] for found, rows in made)
            for each in range(units)
            if each not in gone
        }
        assert unit == min(costs, key=lambda each: costs[each])
        assert loss == pytest.approx(costs[unit] - lost)
        gone.append(unit)
        lost = costs[unit]
    assert sorted(order.units.tolist()) == [*range(units)]


@pytest.mark.parametrize("columns", [torch.arange(8)[:, None], torch.arange(12).reshape(6, 2), uneven()])
def test_what_is_left_makes_up_for_what_is_gone_as_least_squares_does(columns: Tensor) -> None:
    torch.manual_seed(0)
    found, rows = part(columns, 3, 0.1)
    for units in itertools.combinations(range(len(columns)), 3):
        expected, _ = refit(found, rows, [*units])
        torch.testing.assert_close(found.weights + found.change(torch.tensor(units)), expected)


def test_of_many_units_several_go_at_a_time_and_hardly_more_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    found, rows = part(torch.arange(200)[:, None], 8, 1.0)
    chunked = removal_order([found], 200)
    monkeypatch.setattr(elimination, "_CHUNKS", 200)
    exact = removal_order([found], 200)
    for count in (20, 60, 100, 140, 180):
        lost, least = (refit(found, rows, order.units[:count].tolist())[1] for order in (chunked, exact))
        assert lost <= 1.02 * least
        assert float(chunked.losses[:count].sum()) == pytest.approx(lost)


def test_two_units_that_carry_the_same_are_lost_with_the_second_one() -> None:
    torch.manual_seed(0)
    data = torch.randn(100, 5, dtype=torch.float64)
    data[:, 4] = data[:, 0] + 1e-4 * data[:, 4]
    weights = torch.tensor([[5.0, 1, 1, 1, 5]], dtype=torch.float64)
    square = data.T @ data
    order = removal_order([Part(torch.linalg.inv(square), weights, torch.arange(5)[:, None], 1.0)], 5)
    first, second = (order.units.tolist().index(unit) for unit in (0, 4))
    assert min(first, second) == 0
    assert max(first, second) == 4
