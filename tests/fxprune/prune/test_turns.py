"""Groups of convolutions lose as many channels each: orders of removal go in such portions, against brute force."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.channels.groups import Grouping, steps_of
from fxprune.prune.sensitivity.elimination import removal_order
from fxprune.prune.sensitivity.turns import Turns
from tests.fxprune.prune.test_elimination import part, refit


def test_a_turn_takes_the_units_of_each_cell_without_which_least_squares_loses_least() -> None:
    torch.manual_seed(0)
    made = [part(torch.arange(8)[:, None], 3), part(torch.arange(16).reshape(8, 2), 2)]
    cells = np.array([0, 1, 0, 1, 0, 1, 0, 1])
    order = removal_order([found for found, _ in made], 8, Turns(cells, np.ones((3, 2), np.int64)))
    gone: list[int] = []
    for first in range(0, 6, 2):
        allowed = {0, 1}
        for unit in order.units[first : first + 2].tolist():
            costs = {
                each: sum(refit(found, rows, [*gone, each])[1] for found, rows in made)
                for each in range(8)
                if each not in gone and int(cells[each]) in allowed
            }
            assert unit == min(costs, key=lambda each: costs[each])
            gone.append(unit)
            allowed.remove(int(cells[unit]))
    assert sorted(order.units.tolist()) == [*range(8)]
    assert len(order.losses) == 8


def test_turns_may_take_more_of_one_cell_than_of_another() -> None:
    torch.manual_seed(0)
    found, rows = part(torch.arange(9)[:, None], 3)
    cells, counts = np.array([0, 0, 0, 1, 1, 1, 1, 1, 1]), np.array([[1, 2], [0, 2], [1, 1]])
    order = removal_order([found], 9, Turns(cells, counts))
    ends = counts.sum(1).cumsum()
    for begin, end, turn in zip([0, *ends[:-1]], ends, counts, strict=True):
        assert np.bincount(cells[order.units[begin:end]], minlength=2).tolist() == turn.tolist()
    assert float(order.losses[:7].sum()) == pytest.approx(refit(found, rows, order.units[:7].tolist())[1])


def test_many_units_go_in_portions_of_several_turns() -> None:
    torch.manual_seed(0)
    found, rows = part(torch.arange(240)[:, None], 4, 1.0)
    cells = np.arange(240) % 3
    order = removal_order([found], 240, Turns(cells, np.ones((79, 3), np.int64)))
    assert sorted(order.units.tolist()) == [*range(240)]
    assert (np.sort(cells[order.units[:237]].reshape(79, 3)) == np.arange(3)).all()
    for count in (60, 120, 180):
        even = torch.cat([torch.arange(count)])  # as even a choice as any
        assert refit(found, rows, order.units[:count].tolist())[1] < 0.7 * refit(found, rows, even.tolist())[1]


class Grouped(nn.Module):
    """Channels that a convolution of two groups reads, and one without groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 8, 3, padding=1, groups=2)
        self.plain, self.last = nn.Conv2d(16, 4, 1), nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        return self.last(torch.relu(torch.cat([self.grouped(hidden), self.plain(hidden)], 1)))


def test_what_goes_is_what_the_curve_was_measured_without() -> None:
    torch.manual_seed(0)
    model, x = Grouped().eval(), torch.randn(60, 3, 5, 5)
    with torch.no_grad():
        model.first.weight[:8] *= 0.1  # one by one, all of the first group would go first
        model.first.bias[:8] *= 0.1
    traced = fxprune.trace(copy.deepcopy(model), x[:2], modes=["eval"])
    sensitivity = fxprune.sensitivity(traced, x, distance="error", targets="first.weight")
    curve = sensitivity.curves[0]
    cells = np.repeat([0, 1], 8)[list(curve.order)]
    assert (np.sort(cells[:14].reshape(7, 2)) == [0, 1]).all()
    assert all(count % 2 == 0 for count in curve.counts)
    group = next(each for each in Grouping(traced).groups if each.name == "first.weight")
    rows = steps_of([group], [sensitivity(group).numpy()])
    places = {unit: place for place, unit in enumerate(group.units.tolist())}
    for step, row in enumerate(rows[:7]):
        assert {places[unit] for unit in row} == {*curve.order[2 * step : 2 * step + 2]}
    count = curve.counts[1]
    fxprune.prune.channels(traced, count / 16, importance=sensitivity, targets="first.weight", round_to=1)
    dead = (traced.get_buffer("first.weight_mask").flatten(1).sum(1) == 0).nonzero()[:, 0]
    assert {*dead.tolist()} == {*curve.order[:count]}
    final = fxprune.finalize(traced, align=1)
    assert final.get_parameter("grouped.weight").shape[1] == 8 - count // 2
    torch.testing.assert_close(final(x), traced(x), rtol=1e-4, atol=1e-5)


def test_portions_of_groups_without_blocks_are_single_units() -> None:
    model, x = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), torch.randn(4, 3)
    (group, *_) = Grouping(fxprune.trace(model.eval(), x, modes=["eval"])).groups
    turns = Turns.of(group)
    assert [turns.nearest(units) for units in (0.2, 2.4, 9)] == [1, 2, 4]
    assert turns.sizes.tolist() == [1, 2, 3, 4]
    order = torch.tensor([3, 1, 0, 4, 2])
    assert turns.arranged(order).tolist() == [*itertools.chain(range(5))]
