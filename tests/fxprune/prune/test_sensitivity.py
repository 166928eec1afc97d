"""`fxprune.sensitivity` and the importance "obs" in use: budgets, reports, batches, and what is left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fxprune
from tests.attention_spellings import attention


class Halves(nn.Module):
    """A convolution whose halves two convolutions read, in groups: two groups of one name, kind and size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 32, 1), nn.Linear(32, 4)
        self.one, self.other = nn.Conv2d(16, 16, 3, groups=4), nn.Conv2d(16, 16, 3, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.first(x).chunk(2, 1)
        return self.head(torch.cat([self.one(one).relu(), self.other(other).relu()], 1).mean((2, 3)))


def test_groups_of_one_name_kind_and_size_have_curves_of_their_own() -> None:
    torch.manual_seed(0)
    model, x = Halves().eval(), torch.randn(20, 3, 5, 5)
    with torch.no_grad():
        model.one.weight.mul_(0.01)
    traced = fxprune.trace(model, (x[:2],), modes=("eval",))
    sensitivity = fxprune.sensitivity(traced, x)
    groups = [group for group in fxprune.channel_groups(traced) if group.reason is None]
    assert [sensitivity.curve_of(group) for group in groups] == list(sensitivity.curves)
    assert sensitivity.fragile() == ["first.weight (conv group) 2", "first.weight (conv group)"]
    report = fxprune.prune.channels(traced, 0.25, importance=sensitivity, round_to=1)
    assert report.removed == {"first.weight (conv group)": (2, 4), "first.weight (conv group) 2": (0, 4)}


@pytest.mark.parametrize("spelling", ["chunk", "split", "unbind", "torch's own", "separate"])
def test_each_unit_of_a_group_of_head_channels_has_its_place_on_the_curve(spelling: str) -> None:
    model, x = attention(spelling)
    traced = fxprune.trace(model, (x[:2],), modes=("eval",))
    sensitivity = fxprune.sensitivity(traced, x)
    for curve in sensitivity.curves:
        assert sorted(curve.order) == [*range(curve.size)]
        assert len(curve.local) == curve.size
        assert len(curve.losses()) == curve.size + 1
    pruned = copy.deepcopy(traced)
    report = fxprune.prune.channels(pruned, macs=0.7, importance="obs", loader=x, round_to=1)
    assert report.macs[1] <= 0.7 * report.macs[0]
