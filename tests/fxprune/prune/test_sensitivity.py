"""`fxprune.sensitivity` and the importance "obs" in use: budgets, reports, batches, and what is left as it was."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxprune
from tests.attention_spellings import Attention, attention


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


@pytest.fixture(scope="module")
def dense() -> tuple[fxprune.TracedModule, Tensor, fxprune.Sensitivity]:
    torch.manual_seed(0)
    model, x = Joined().eval(), torch.randn(40, 3, 8, 8)
    traced = fxprune.trace(model, (x[:2],))
    return traced, x, fxprune.sensitivity(traced, x)


class Joined(nn.Module):
    """A network of concatenations, batch norms, a depthwise convolution, and a squeeze that scales channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.norm, self.deep = nn.BatchNorm2d(64), nn.Conv2d(64, 64, 3, groups=64)
        self.down, self.up = nn.Linear(64, 8), nn.Linear(8, 64)
        self.last, self.head = nn.Conv2d(64, 32, 1), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        y = self.deep(self.norm(torch.cat([y, self.second(y)], 1)).relu())
        y = y * torch.sigmoid(self.up(self.down(y.mean((2, 3))).relu()))[:, :, None, None]
        return self.head(self.last(y).relu().mean((2, 3)))


def masks_of(traced: fxprune.TracedModule) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in traced.named_buffers() if name.endswith("_mask")}


def test_measuring_changes_nothing_and_the_importance_is_the_same_analysis(
    dense: tuple[fxprune.TracedModule, Tensor, fxprune.Sensitivity],
) -> None:
    traced, x, sensitivity = dense
    own = copy.deepcopy(traced).train()
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    state = torch.random.get_rng_state()
    again = fxprune.sensitivity(own, [*x.split(7)])
    assert own.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())
    assert all(parameter.grad is None for parameter in own.parameters())
    for one, other in zip(sensitivity.curves, again.curves, strict=True):
        assert one.order == other.order
        assert other.measured == pytest.approx(one.measured, rel=1e-3, abs=1e-9)
    given, named = copy.deepcopy(traced), copy.deepcopy(traced)
    fxprune.prune.channels(given, macs=0.5, importance=sensitivity)
    fxprune.prune.channels(named, macs=0.5, importance="obs", loader=x)
    assert masks_of(given).keys() == masks_of(named).keys() != set()
    assert all(torch.equal(mask, masks_of(named)[name]) for name, mask in masks_of(given).items())


@pytest.mark.parametrize(
    "budget",
    [
        {"macs": 0.7}, {"macs": 0.3, "round_to": 1}, {"parameters": 0.5, "round_to": 1}, {"amount": 0.4, "round_to": 8},
        {"amount": 0.4, "scope": "local", "round_to": 1},
        {"macs": 0.5, "max_per_group": 0.6, "at_least": 4, "round_to": 1},
    ],
    ids=str,
)  # fmt: skip
def test_one_analysis_serves_every_budget(
    budget: dict[str, Any], dense: tuple[fxprune.TracedModule, Tensor, fxprune.Sensitivity]
) -> None:
    traced, _, sensitivity = dense
    own = copy.deepcopy(traced)
    report = fxprune.prune.channels(own, importance=sensitivity, **budget)
    shares = {group: gone / units for group, (gone, units) in report.removed.items()}
    final = fxprune.finalize(own)
    assert (final.plan.macs[1], final.plan.parameters[1]) == (report.macs[1], report.parameters[1])
    match budget:
        case {"macs": share}:
            assert (share - 0.05) * report.macs[0] <= report.macs[1] <= share * report.macs[0]
        case {"parameters": share}:
            assert (share - 0.05) * report.parameters[0] <= report.parameters[1] <= share * report.parameters[0]
        case {"amount": share, "scope": "local"}:
            assert all(share - 0.15 < gone < share + 0.15 for gone in shares.values())
        case {"amount": share}:
            assert report.gone == pytest.approx(share, abs=0.1)
    if "max_per_group" in budget:
        assert max(shares.values()) <= 0.6


def test_less_is_lost_than_by_weights_alone(
    dense: tuple[fxprune.TracedModule, Tensor, fxprune.Sensitivity],
) -> None:
    traced, x, sensitivity = dense
    lost = []
    for importance in (sensitivity, "l2"):
        own = copy.deepcopy(traced).eval()
        fxprune.prune.channels(own, macs=0.5, importance=importance, round_to=1)
        fxprune.reconstruct(own, x)
        lost.append((own(x) - traced.eval()(x)).square().mean().item())
    assert lost[0] < lost[1]


def test_asked_for_more_curves_that_are_there_choose_anew_and_data_is_looked_at_again(
    dense: tuple[fxprune.TracedModule, Tensor, fxprune.Sensitivity],
) -> None:
    traced, x, sensitivity = dense
    steps, once, again = (copy.deepcopy(traced) for _ in range(3))
    for macs in (0.7, 0.5):
        fxprune.prune.channels(steps, macs=macs, importance=sensitivity, round_to=1)
    fxprune.prune.channels(once, macs=0.5, importance=sensitivity, round_to=1)
    assert all(torch.equal(mask, masks_of(once)[name]) for name, mask in masks_of(steps).items())
    fxprune.prune.channels(again, macs=0.7, importance="obs", loader=x, round_to=1)
    before = masks_of(copy.deepcopy(again))
    report = fxprune.prune.channels(again, macs=0.5, importance="obs", loader=x, round_to=1)
    assert report.macs[1] <= 0.5 * report.macs[0]
    assert all(not bool((mask > before[name]).any()) for name, mask in masks_of(again).items() if name in before)


def test_masks_that_are_there_count_and_curves_are_those_of_what_is_left(
    dense: tuple[fxprune.TracedModule, Tensor, fxprune.Sensitivity],
) -> None:
    traced, x, _ = dense
    own = copy.deepcopy(traced)
    fxprune.prune.ln_structured(own, "first.weight", 0.25, 1, 0)
    fxprune.prune.l1_unstructured(own, "second.weight", 0.3)
    there = masks_of(copy.deepcopy(own))
    report = fxprune.prune.channels(own, macs=0.5, importance="obs", loader=x, round_to=1)
    assert report.macs[1] <= 0.5 * report.macs[0]
    assert all(not bool((masks_of(own)[name] > mask).any()) for name, mask in there.items())


class Unread(nn.Module):
    """Channels that no contraction reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).square().sum(-1, keepdim=True)


def test_of_channels_that_nothing_reads_the_smallest_go_first_and_are_measured() -> None:
    torch.manual_seed(0)
    model, x = Unread().double().eval(), torch.randn(20, 6, dtype=torch.float64)
    traced = fxprune.trace(model, (x[:2],), modes=("eval",))
    (curve,) = fxprune.sensitivity(traced, x, shares=(0.25, 0.5)).curves
    held = x[torch.arange(20) % 5 == 1]
    sizes = model.first.weight.square().sum(1)
    assert curve.order == tuple(sizes.argsort().tolist())
    with torch.no_grad():
        dense = model(held)
        for count, measured in zip(curve.counts, curve.measured, strict=True):
            own = model.first(held)
            own[:, list(curve.order[:count])] = 0
            lacking = own.square().sum(-1, keepdim=True) - dense
            assert measured == pytest.approx(float(lacking.square().sum() / (dense - dense.mean()).square().sum()))
    assert fxprune.prune.channels(traced, 0.5, importance="obs", loader=x, round_to=1).removed


def test_curves_are_convex_and_the_report_is_data(
    dense: tuple[fxprune.TracedModule, Tensor, fxprune.Sensitivity],
) -> None:
    traced, _, sensitivity = dense
    for curve in sensitivity.curves:
        losses = curve.losses()
        assert losses[0] == 0
        assert (np.diff(losses) >= -1e-15).all()
        assert (np.diff(losses, 2) >= -1e-12).all()
        assert np.cumsum(curve.slopes()[list(curve.order)]) == pytest.approx(losses[1:])
        assert (losses[list(curve.counts)] <= np.maximum.accumulate(curve.measured) + 1e-12).all()
    data = json.loads(json.dumps(sensitivity.to_dict(), allow_nan=False))
    assert [each["measured"] for each in data["curves"]] == [[*curve.measured] for curve in sensitivity.curves]
    assert str(sensitivity).startswith(f"{len(sensitivity.curves)} groups measured in ")
    assert "moments of 32 samples, losses (divergence) on 8 others" in str(sensitivity)
    lines = sensitivity.table().splitlines()
    for curve, group in zip(sensitivity.curves, fxprune.channel_groups(traced), strict=False):
        (line,) = (line for line in lines if line.split()[:1] == [curve.name])
        assert line.split()[-2:] == [f"{group.macs:,}", f"{group.parameters:,}"]
    assert sorted(sensitivity.fragile()) == sorted(f"{curve.name} ({curve.kind})" for curve in sensitivity.curves)


class Padded(Attention):
    """An attention that is told which tokens are padding."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        met = functional.scaled_dot_product_attention(*self.heads(x), attn_mask=(mask != 0)[:, None, None])
        return self.head(torch.tanh(self.out(met.transpose(1, 2).reshape(x.shape))))


def test_what_padding_holds_changes_nothing_where_it_has_no_weight() -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(40, 5, 16, dtype=torch.float64), torch.ones(40, 5).long()
    mask[::2, 3:] = 0
    traced = fxprune.trace(Padded("separate").double().eval(), (x[:2], mask[:2]), modes=("eval",))
    found = [
        fxprune.sensitivity(traced, (inputs, mask), weight=lambda x, mask: mask).curves
        for inputs in (x, x.where(mask[..., None] != 0, 7.0))
    ]
    assert {curve.kind for curve in found[0]} == {"attention head", "head channel", "MLP unit"}
    for one, other in zip(*found, strict=True):
        assert one.order == other.order
        assert one.measured == pytest.approx(other.measured)
