"""Budgets of MACs and of parameters kept at once: the one that binds is used up, whatever importance chooses."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import PruningError
from fxprune.prune.channel_report import ChannelReport
from tests.budget_networks import network
from tests.random_networks import network as random_network

SIZES = ("macs", "parameters")


def convolutions(*channels: int, image: int = 12) -> fxprune.TracedModule:
    """Parameters are in late layers, MACs in early ones: every convolution but the last is followed by a pool."""
    torch.manual_seed(sum(channels))
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise((3, *channels)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers[-1:] = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 3)]
    return fxprune.trace(nn.Sequential(*layers).eval(), (torch.randn(2, 3, image, image),), modes=("eval",))


def check(traced: fxprune.TracedModule, report: ChannelReport, shares: dict[str, float], unit: dict[str, int]) -> None:
    """The report is the finalized module's, both budgets are kept, and one is used up to 2 %, or to a unit."""
    plan = fxprune.finalize(traced).plan
    assert plan is not None
    assert (plan.macs, plan.parameters) == (report.macs, report.parameters)
    used = {}
    for name in SIZES:
        before, after = getattr(report, name)
        assert after <= shares[name] * before
        used[name] = after >= 0.98 * shares[name] * before or after + unit[name] > shares[name] * before
    assert used[report.budget]


def largest_units(traced: fxprune.TracedModule) -> dict[str, int]:
    return {
        name: max(getattr(group, name) for group in fxprune.channel_groups(traced) if group.reason is None)
        for name in SIZES
    }


IMPORTANCES = ["l1", "l2", "linf", "fpgm", "random", "taylor", "obs", "a function"]


def choose(traced: fxprune.TracedModule, importance: str, x: Tensor, **options: Any) -> ChannelReport:
    if importance == "obs":
        options["loader"] = [x]
    if importance == "taylor":
        options |= {"loader": [(x, torch.zeros(len(x), 3))], "loss": nn.functional.mse_loss}
    given: Any = (lambda group: torch.arange(group.size) + 1.0) if importance == "a function" else importance
    return fxprune.prune.channels(traced, importance=given, seed=0 if importance == "random" else None, **options)


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("shares", [(0.5, 0.6), (0.7, 0.3), pytest.param((0.3, 0.9), marks=pytest.mark.slow)])
def test_both_are_kept_and_the_one_that_binds_is_used_up(importance: str, shares: tuple[float, float]) -> None:
    traced = convolutions(16, 32, 48)
    torch.manual_seed(1)
    x = torch.randn(20, 3, 12, 12)
    asked = dict(zip(SIZES, shares, strict=True))
    unit = largest_units(traced)
    report = choose(traced, importance, x, **asked, round_to=1)
    check(traced, report, asked, unit)


@pytest.mark.parametrize("family", ["cnn", "transformer", "depthwise"])
@pytest.mark.parametrize("round_to", ["auto", 1])
def test_families_of_networks_land(family: str, round_to: Any) -> None:
    model, inputs = network(family, 64)
    traced = fxprune.trace(model, inputs, modes=("eval",), dynamic_shapes=None)
    asked = {"macs": 0.6, "parameters": 0.55}
    unit = largest_units(traced)
    check(traced, fxprune.prune.channels(traced, **asked, round_to=round_to), asked, unit)


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(n, marks=pytest.mark.slow) for n in range(6, 10))])
def test_random_networks_land_or_the_budget_that_cannot_be_reached_is_named(seed: int) -> None:
    model, sample = random_network(seed, words=seed % 2 == 0)  # with masks of its own, which may leave less
    traced = fxprune.trace(model, (sample(2),), modes=("eval",))
    asked, why = {"macs": 0.75, "parameters": 0.8}, ""
    try:
        report = fxprune.prune.channels(traced, **asked, round_to=1)
    except PruningError as error:
        why = str(error)
    else:
        plan = fxprune.finalize(traced).plan
        assert plan is not None
        assert (plan.macs, plan.parameters) == (report.macs, report.parameters)
        assert all(getattr(report, name)[1] <= share * getattr(report, name)[0] for name, share in asked.items())
    assert not why or "cannot be reached" in why or "no group is left" in why


@pytest.mark.parametrize("importance", ["l2", "obs"])
@pytest.mark.parametrize("budget", SIZES)
def test_a_budget_that_does_not_bind_has_no_say(importance: str, budget: str) -> None:
    traced = convolutions(8, 12, 16)
    x = torch.randn(20, 3, 12, 12)
    alone, both = copy.deepcopy(traced), copy.deepcopy(traced)
    other = SIZES[1 - SIZES.index(budget)]
    first = choose(alone, importance, x, **{budget: 0.5}, round_to=1)
    second = choose(both, importance, x, **{budget: 0.5, other: 1.0}, round_to=1)
    assert second.budget == budget
    if importance == "l2":
        assert second == first
    check(both, second, {budget: 0.5, other: 1.0}, largest_units(traced))


def counts_left(report: ChannelReport) -> list[int]:
    return [size - gone for gone, size in report.removed.values()]


def sizes_of(channels: list[int], image: int) -> tuple[int, int]:
    """MACs and parameters of `convolutions`, by hand."""
    macs = parameters = 0
    for inputs, outputs in itertools.pairwise([3, *channels]):
        macs += image * image * 9 * inputs * outputs
        parameters += (9 * inputs + 1) * outputs
        image //= 2
    return macs + 3 * channels[-1], parameters + 3 * channels[-1] + 3


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.8, 0.4), (0.4, 0.8), (0.3, 0.3)])
@pytest.mark.parametrize("channels", [(5, 6), pytest.param((6, 5), marks=pytest.mark.slow), (4, 5, 6)])
def test_curves_lose_hardly_more_than_the_best_of_all_choices(
    channels: tuple[int, ...], shares: tuple[float, float]
) -> None:
    traced = convolutions(*channels)
    torch.manual_seed(2)
    sensitivity = fxprune.sensitivity(traced, torch.randn(60, 3, 12, 12))
    losses = [curve.losses() for curve in sensitivity.curves]
    dense = sizes_of([*channels], 12)

    def lost(left: list[int]) -> float:
        return sum(float(own[size - count]) for own, size, count in zip(losses, channels, left, strict=True))

    fitting = [
        [*left]
        for left in itertools.product(*(range(1, size + 1) for size in channels))
        if all(size <= share * whole for size, share, whole in zip(sizes_of([*left], 12), shares, dense, strict=True))
    ]
    best = min(map(lost, fitting))
    report = fxprune.prune.channels(traced, importance=sensitivity, round_to=1, **dict(zip(SIZES, shares, strict=True)))
    found = counts_left(report)
    assert (report.macs, report.parameters) == tuple(zip(dense, sizes_of(found, 12), strict=True))
    assert found in fitting
    assert lost(found) <= 1.25 * best + 1e-9


def test_a_smaller_budget_of_both_ends_where_it_would_have_ended_at_once() -> None:
    once, steps = convolutions(16, 32, 48), convolutions(16, 32, 48)
    wanted = fxprune.prune.channels(once, macs=0.4, parameters=0.5, round_to=1)
    for macs, parameters in ((0.8, 0.9), (0.6, 0.9), (0.4, 0.5)):
        report = fxprune.prune.channels(steps, macs=macs, parameters=parameters, round_to=1)
    assert report == wanted


def test_counts_and_shares_can_be_mixed() -> None:
    traced = convolutions(16, 32, 48)
    dense = fxprune.channel_groups(traced)
    assert dense
    report = fxprune.prune.channels(copy.deepcopy(traced), macs=0.5, parameters=12_000, round_to=1)
    assert report.macs[1] <= 0.5 * report.macs[0]
    assert report.parameters[1] <= 12_000
    assert report.gone == 1 - getattr(report, report.budget)[1] / getattr(report, report.budget)[0]
    assert dataclasses.replace(report, budget="macs").gone == 1 - report.macs[1] / report.macs[0]
