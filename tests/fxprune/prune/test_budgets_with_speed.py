"""A speed beside MACs and parameters: all are kept, the one that binds is used up, and the report says which."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import driver
from fxprune.errors import ArgumentError, PruningError
from fxprune.prune.channel_report import ChannelReport
from tests.budget_networks import network
from tests.fxprune.prune import test_budgets_together as sizes
from tests.fxprune.prune import test_latency_table as latencies


class Clock:
    """In the place of onnxruntime: the time is a mixture of MACs, of parameters and of what does not shrink."""

    def __init__(self, macs: float = 1.0, parameters: float = 0.0, fixed: float = 0.0) -> None:
        self.shares, self.calls = (macs, parameters, fixed), 0

    def speedup(self, plan: Any) -> float:
        macs, parameters, fixed = self.shares
        return sum(self.shares) / (
            macs * plan.macs[1] / plan.macs[0] + parameters * plan.parameters[1] / plan.parameters[0] + fixed
        )

    @contextlib.contextmanager
    def __call__(self, dense: fxprune.TracedModule, **options: Any) -> Iterator[Any]:
        def measure(masks: Mapping[str, Tensor]) -> float:
            self.calls += 1
            candidate = copy.deepcopy(dense)
            driver.insert_masks(candidate, masks)
            return self.speedup(fxprune.finalize(candidate, align=1).plan)

        yield measure


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Speed is in proportion to MACs until a test says otherwise."""
    found = Clock()
    monkeypatch.setattr(driver, "stopwatch", lambda traced, **options: found(traced, **options))
    return found


def check(traced: fxprune.TracedModule, report: ChannelReport, asked: dict[str, float], clock: Clock) -> None:
    """The report is the finalized module's, all is kept, and what binds is used up: sizes to a unit, speed to 5 %."""
    plan = fxprune.finalize(traced).plan
    assert plan is not None
    assert (plan.macs, plan.parameters) == (report.macs, report.parameters)
    assert report.speedup == pytest.approx(clock.speedup(plan))
    assert report.speedup is not None
    assert report.speedup >= asked["speedup"]
    for name in asked.keys() - {"speedup"}:
        before, after = getattr(report, name)
        assert after <= asked[name] * before
        if report.budget == name:
            unit = sizes.largest_units(traced)[name]
            assert after >= 0.98 * asked[name] * before or after + unit > asked[name] * before
    if report.budget == "speedup":
        assert report.speedup <= 1.05 * asked["speedup"]
    assert report.asked == asked


COMBINATIONS = [
    ({"macs": 0.7, "speedup": 2.0}, "speedup"),
    ({"macs": 0.4, "speedup": 2.0}, "macs"),
    ({"parameters": 0.3, "speedup": 1.2}, "parameters"),
    ({"parameters": 0.9, "speedup": 2.0}, "speedup"),
    ({"macs": 0.4, "parameters": 0.9, "speedup": 1.5}, "macs"),
    ({"macs": 0.9, "parameters": 0.3, "speedup": 1.1}, "parameters"),
    ({"macs": 0.9, "parameters": 0.9, "speedup": 2.0}, "speedup"),
]


@pytest.mark.parametrize("importance", ["l2", "obs"])
@pytest.mark.parametrize(("asked", "binds"), COMBINATIONS)
def test_all_are_kept_and_the_one_that_binds_is_used_up(
    clock: Clock, asked: dict[str, float], binds: str, importance: str
) -> None:
    traced = sizes.convolutions(16, 32, 48)
    torch.manual_seed(1)
    report = sizes.choose(traced, importance, torch.randn(20, 3, 12, 12), **asked, round_to=1)
    assert report.budget == binds
    check(traced, report, asked, clock)


@pytest.mark.parametrize("importance", sizes.IMPORTANCES)
def test_every_importance_keeps_all(clock: Clock, importance: str) -> None:
    clock.shares = (0.5, 0.3, 0.2)
    traced = sizes.convolutions(16, 32, 48)
    torch.manual_seed(1)
    asked = {"macs": 0.6, "parameters": 0.6, "speedup": 1.8}
    report = sizes.choose(traced, importance, torch.randn(20, 3, 12, 12), **asked, round_to=1)
    check(traced, report, asked, clock)


@pytest.mark.parametrize("family", ["cnn", "transformer", "depthwise"])
@pytest.mark.parametrize("round_to", ["auto", 1])
def test_families_of_networks_land(clock: Clock, family: str, round_to: Any) -> None:
    clock.shares = (0.7, 0.2, 0.1)
    model, inputs = network(family, 64)
    traced = fxprune.trace(model, inputs, modes=("eval",), dynamic_shapes=None)
    asked = {"macs": 0.6, "parameters": 0.75, "speedup": 1.5}
    check(traced, fxprune.prune.channels(traced, **asked, round_to=round_to), asked, clock)


@pytest.mark.parametrize("importance", ["l2", "obs"])
def test_a_speed_that_does_not_bind_has_no_say_and_is_measured_once_or_twice(clock: Clock, importance: str) -> None:
    alone, both = sizes.convolutions(8, 12, 16), sizes.convolutions(8, 12, 16)
    x = torch.randn(20, 3, 12, 12)
    first = sizes.choose(alone, importance, x, macs=0.5, round_to=1)
    assert not clock.calls
    second = sizes.choose(both, importance, x, macs=0.5, speedup=1.2, round_to=1)
    assert clock.calls == 1
    assert second.budget == "macs"
    assert (second.removed, second.macs, second.parameters) == (first.removed, first.macs, first.parameters)


def test_sizes_that_do_not_bind_leave_about_what_the_speed_alone_leaves(clock: Clock) -> None:
    alone, both = sizes.convolutions(16, 32, 48), sizes.convolutions(16, 32, 48)
    first = fxprune.prune.channels(alone, speedup=2.0, round_to=1)
    second = fxprune.prune.channels(both, speedup=2.0, macs=1.0, parameters=1.0, round_to=1)
    assert second.budget == "speedup"
    assert second.macs[1] == pytest.approx(first.macs[1], rel=0.05)


@pytest.mark.parametrize("shares", [(1.0, 0.0, 0.0), (0.9, 0.1, 0.0), (0.7, 0.1, 0.2)])
@pytest.mark.parametrize("asked", [(0.8, 0.6, 1.8), (0.6, 0.9, 1.6), (0.5, 0.5, 2.2)])
def test_curves_lose_hardly_more_than_the_best_of_all_choices(
    clock: Clock, asked: tuple[float, float, float], shares: tuple[float, float, float]
) -> None:
    clock.shares = shares
    channels = (5, 6)
    traced = sizes.convolutions(*channels)
    torch.manual_seed(2)
    sensitivity = fxprune.sensitivity(traced, torch.randn(60, 3, 12, 12))
    losses = [curve.losses() for curve in sensitivity.curves]
    dense = sizes.sizes_of([*channels], 12)

    def lost(left: list[int]) -> float:
        return sum(float(own[size - count]) for own, size, count in zip(losses, channels, left, strict=True))

    def fits(left: list[int]) -> bool:
        macs, parameters = (size / whole for size, whole in zip(sizes.sizes_of(left, 12), dense, strict=True))
        seconds = shares[0] * macs + shares[1] * parameters + shares[2]
        return macs <= asked[0] and parameters <= asked[1] and 1 / seconds >= asked[2] * 1.02

    fitting = [[*left] for left in itertools.product(*(range(1, size + 1) for size in channels)) if fits([*left])]
    budgets = dict(zip(("macs", "parameters", "speedup"), asked, strict=True))
    report = fxprune.prune.channels(traced, importance=sensitivity, round_to=1, **budgets)
    found = sizes.counts_left(report)
    assert found in fitting
    assert lost(found) <= 1.25 * min(map(lost, fitting)) + 1e-9


def test_latencies_weigh_losses_where_sizes_are_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    latencies.use(monkeypatch, latencies.FakeClock())
    traced = latencies.blocks(nn.ReLU(), nn.Tanh())
    sensitivity = fxprune.sensitivity(traced, torch.randn(64, 8), distance="error")
    reports = {}
    for prices in ("macs", "latency"):
        candidate = copy.deepcopy(traced)
        options: Any = {"importance": sensitivity, "prices": prices, "round_to": 1}
        reports[prices] = report = fxprune.prune.channels(candidate, speedup=1.5, parameters=0.95, **options)
        assert report.speedup is not None
        assert report.speedup >= 1.5
        assert report.parameters[1] <= 0.95 * report.parameters[0]
        assert report.budget == "speedup"
    by_macs, in_time = (latencies.gone(reports[prices]) for prices in ("macs", "latency"))
    assert by_macs[0] > in_time[0]  # the slow block goes first
    assert sum(in_time) < sum(by_macs)


@pytest.mark.parametrize("importance", ["l2", "obs"])
@pytest.mark.parametrize(
    ("asked", "fixed", "message"),
    [
        (
            {"macs": 0.5, "speedup": 50.0},
            0.5,
            r"speedup=50\.0 cannot be reached: the best that was measured is [12]\.\d",
        ),
        ({"macs": 0.0001, "speedup": 1.5}, 0.0, r"macs=0\.0001 cannot be reached.*best"),
        ({"macs": 0.9, "parameters": 0.0001, "speedup": 1.5}, 0.0, r"parameters=0\.0001 cannot be reached.*best"),
    ],
)
def test_what_cannot_be_reached_is_named_and_nothing_is_masked(
    clock: Clock, asked: dict[str, float], fixed: float, message: str, importance: str
) -> None:
    clock.shares = (1 - fixed, 0.0, fixed)
    traced = sizes.convolutions(8, 12, 16)
    with pytest.raises(PruningError, match=message):
        sizes.choose(traced, importance, torch.randn(20, 3, 12, 12), **asked, round_to=1)
    assert not fxprune.prune.is_pruned(traced)


def test_an_amount_says_what_goes_and_stands_alone(clock: Clock) -> None:
    traced = sizes.convolutions(8, 12, 16)
    with pytest.raises(ArgumentError, match=r"amount=0\.5 and speedup=2\.0 were given.*one of them"):
        fxprune.prune.channels(traced, 0.5, speedup=2.0)
    assert not fxprune.prune.is_pruned(traced)


def test_the_report_says_what_was_asked_for_and_what_came_of_it(clock: Clock) -> None:
    traced = sizes.convolutions(16, 32, 48)
    report = fxprune.prune.channels(traced, macs=20_000_000, parameters=0.6, speedup=1.5, round_to=1)
    assert report.asked == {"macs": 20_000_000, "parameters": 0.6, "speedup": 1.5}
    share = report.parameters[1] / report.parameters[0]
    assert report.got == {"macs": report.macs[1], "parameters": share, "speedup": report.speedup}
    line = next(line for line in str(report).splitlines() if "budgets" in line)
    assert f"macs=20000000 ({report.macs[1]:,}), parameters=0.6 ({share:.3f}), speedup=1.5 (" in line
    assert line.endswith(f"{report.budget} binds")
    data = json.loads(json.dumps(report.to_dict()))
    again = ChannelReport.from_dict(data)
    assert again == report
    assert again.asked == report.asked
    assert str(again) == str(report)
    del data["asked"], data["got"]  # as written before there was more than one
    assert ChannelReport.from_dict(data) == report


def test_a_schedule_grows_under_all(clock: Clock) -> None:
    traced = sizes.convolutions(16, 32, 48)

    def request(gone: float) -> ChannelReport:
        speed = {"speedup": 1 / (1 - gone)} if gone else {}
        return fxprune.prune.channels(traced, macs=1 - gone, parameters=1 - gone / 2, round_to=1, **speed)

    schedule = fxprune.Schedule(traced, None, request, 0.5, curve="linear", stop=3)
    before: dict[str, Tensor] = {}
    for _ in range(4):
        schedule.step()
        after = {name: mask.clone() for name, mask in traced.named_buffers() if name.endswith("_mask")}
        assert all((after[name] <= mask).all() for name, mask in before.items())
        before = after
    check(traced, schedule.reports[-1], {"macs": 0.5, "parameters": 0.75, "speedup": 2.0}, clock)
    assert schedule.done
