"""Schedules: the curve, the counts it leads to under torch's methods, checkpoints, and no regrowth."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import fxprune
from fxprune.errors import ArgumentError, ArgumentTypeError, ArtifactError, FxpruneError, PruningError
from fxprune.prune.methods import BlockStructured
from fxprune.prune.schedule import CURVES

NAMES = ("0.weight", "2.weight")
L1 = prune.L1Unstructured


@pytest.fixture(scope="module")
def captured() -> fxprune.TracedModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 9))
    return fxprune.trace(model, (torch.randn(3, 12),))


@pytest.fixture
def traced(captured: fxprune.TracedModule) -> fxprune.TracedModule:
    return copy.deepcopy(captured)


def _masked(traced: fxprune.TracedModule, name: str) -> int:
    return int((traced.state_dict()[f"{name}_mask"] == 0).sum()) if fxprune.prune.is_pruned(traced, name) else 0


def test_the_curves_are_the_published_formulas(traced: fxprune.TracedModule) -> None:
    formulas = {
        "one-shot": lambda x: 0.9,
        "linear": lambda x: 0.2 + 0.7 * x,
        "cubic": lambda x: 0.9 + (0.2 - 0.9) * (1 - x) ** 3,
        "exponential": lambda x: 1 - 0.8 * (0.1 / 0.8) ** x,
    }
    for curve in CURVES:
        schedule = fxprune.Schedule(
            traced, "*.weight", lambda f: None, 0.9, curve=curve, start=3, stop=13, every=2, initial=0.2
        )
        assert schedule.amount == 0.0
        for call in range(20):
            schedule.step()
            progress = min(max(call - 3, 0) // 2 * 2, 10) / 10
            assert schedule.amount == pytest.approx(formulas[curve](progress) if call >= 3 else 0.0)
            assert schedule.done == (call >= 13)
        assert schedule.amount == 0.9


@given(
    amount=st.floats(0, 1),
    initial=st.floats(0, 1),
    curve=st.sampled_from(list(CURVES)),
    start=st.integers(0, 5),
    length=st.integers(0, 30),
    every=st.integers(1, 7),
)
def test_every_curve_is_monotone_and_ends_at_the_amount(
    captured: fxprune.TracedModule, amount: float, initial: float, curve: str, start: int, length: int, every: int
) -> None:
    initial, amount = sorted((initial, amount))
    if curve == "exponential" and amount == 1:
        amount = initial = 0.5
    schedule = fxprune.Schedule(
        captured, NAMES, lambda f: None, amount, curve=curve, start=start, stop=start + length, every=every,
        initial=initial,
    )  # fmt: skip
    amounts = []
    while not schedule.done:
        schedule.step()
        amounts.append(schedule.amount)
    assert all(b >= a - 1e-15 for a, b in itertools.pairwise(amounts))
    assert amounts[-1] == amount
    assert all(0 <= a <= 1 for a in amounts)


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("method", [L1, prune.RandomUnstructured])
def test_counts_follow_the_dense_size_at_every_call(
    traced: fxprune.TracedModule, method: type[prune.BasePruningMethod], scope: str
) -> None:
    sizes = {name: traced.get_parameter(name).numel() for name in NAMES}
    schedule = fxprune.Schedule(traced, NAMES, method, 0.87, stop=9, scope=scope)
    for _ in range(12):
        reached = schedule.step()
        counts = {name: _masked(traced, name) for name in NAMES}
        if scope == "local":
            assert counts == {name: round(schedule.amount * size) for name, size in sizes.items()}
        else:
            assert sum(counts.values()) == round(schedule.amount * sum(sizes.values()))
        assert reached == schedule.reached == sum(counts.values()) / sum(sizes.values())
    assert schedule.reached == pytest.approx(0.87, abs=0.002)


def test_local_pruning_counts_what_each_parameter_has_masked_already(traced: fxprune.TracedModule) -> None:
    fxprune.prune.random_unstructured(traced, "0.weight", 100)  # of 192
    schedule = fxprune.Schedule(traced, NAMES, L1, 0.5, stop=4, curve="linear")
    counts = []
    for _ in range(5):
        schedule.step()
        counts.append((_masked(traced, "0.weight"), _masked(traced, "2.weight")))
    assert counts == [(100, 0), (100, 18), (100, 36), (100, 54), (100, 72)]


@pytest.mark.parametrize(
    ("method", "kwargs", "unit"), [(prune.LnStructured, {"n": 2, "dim": 1}, 16), (BlockStructured, {}, 4)]
)
def test_channels_and_blocks_come_within_half_a_unit(
    traced: fxprune.TracedModule, method: type[prune.BasePruningMethod], kwargs: dict[str, Any], unit: int
) -> None:
    schedule = fxprune.Schedule(traced, "0.weight", method, 0.6, stop=10, **kwargs)
    while not schedule.done:
        schedule.step()
        assert abs(_masked(traced, "0.weight") - schedule.amount * 192) <= unit / 2 + 0.5


def test_one_shot_is_the_plain_request(traced: fxprune.TracedModule) -> None:
    other = copy.deepcopy(traced)
    fxprune.prune.l1_unstructured(other, "*.weight", 0.7)
    schedule = fxprune.Schedule(traced, "*.weight", L1, 0.7, curve="one-shot", start=2)
    assert [schedule.step() > 0 for _ in range(4)] == [False, False, True, True]
    assert all(torch.equal(a, b) for a, b in zip(traced.buffers(), other.buffers(), strict=True))


def test_a_function_gets_the_fraction_of_the_survivors(traced: fxprune.TracedModule) -> None:
    asked = []

    def request(fraction: float) -> None:
        asked.append(fraction)
        fxprune.prune.l1_unstructured(traced, "*.weight", fraction)

    schedule = fxprune.Schedule(traced, NAMES, request, 0.75, curve="exponential", stop=2)
    reached = [schedule.step() for _ in range(4)]
    assert asked == pytest.approx([0.5, 0.5])
    assert reached == [0.0, 0.5, 0.75, 0.75]


def test_momentum_and_weight_decay_never_bring_a_masked_entry_back(traced: fxprune.TracedModule) -> None:
    traced.train()
    optimizer = torch.optim.SGD(traced.parameters(), 0.05, momentum=0.9, weight_decay=0.1)
    schedule = fxprune.Schedule(traced, NAMES, L1, 0.9, start=3, stop=15, every=2, scope="global")
    dead = {name: torch.zeros(traced.get_parameter(name).shape, dtype=torch.bool) for name in NAMES}
    moved = False
    for _ in range(25):
        optimizer.zero_grad()
        (traced(torch.randn(8, 12)) - 1).square().mean().backward()
        before = {n: traced.state_dict().get(f"{n}_orig", torch.zeros(1)).clone() for n in NAMES}
        optimizer.step()
        schedule.step()
        for name in NAMES if fxprune.prune.is_pruned(traced) else ():
            masked = traced.get_buffer(f"{name}_mask") == 0
            assert (masked | ~dead[name]).all()
            values = traced.get_parameter(f"{name}_orig")
            moved |= bool(before[name].numel() > 1 and ((values != before[name]) & dead[name]).any())
            with torch.no_grad():
                values[dead[name]] += 10  # even if what lies under the mask became the largest of all
            dead[name] = masked
    assert moved
    final = fxprune.finalize(traced, shrink=False)
    for name in NAMES:
        assert (final.get_parameter(name)[dead[name]] == 0).all()


class Reviving(prune.BasePruningMethod):
    PRUNING_TYPE = "global"

    def __init__(self, amount: float) -> None:
        self.amount = amount

    def compute_mask(self, t: torch.Tensor, default_mask: torch.Tensor) -> torch.Tensor:
        return (torch.rand_like(t) > 0.5).to(t.dtype)


def test_a_request_that_unmasks_is_refused_and_undone(traced: fxprune.TracedModule) -> None:
    fxprune.prune.l1_unstructured(traced, "0.weight", 0.5)
    before = {key: value.clone() for key, value in traced.state_dict().items()}
    reviving = [Reviving, lambda f: fxprune.prune.apply(traced, "*.weight", Reviving(f))]
    for request in reviving:
        schedule = fxprune.Schedule(traced, NAMES, request, 0.9)
        with pytest.raises(PruningError, match="would unmask .* '0.weight'"):
            schedule.step()
        assert not schedule.done
        state = traced.state_dict()
        assert all(torch.equal(state[key], value) for key, value in before.items() if key in state)
        assert _masked(traced, "2.weight") == 0


def test_a_failing_request_leaves_masks_and_count(traced: fxprune.TracedModule) -> None:
    def request(fraction: float) -> None:
        fxprune.prune.l1_unstructured(traced, "0.weight", fraction)
        raise RuntimeError("no more")

    schedule = fxprune.Schedule(traced, NAMES, request, 0.5)
    with pytest.raises(RuntimeError, match="no more"):
        schedule.step()
    assert schedule.reached == 0
    assert schedule.state_dict()["calls"] == 0


@pytest.mark.parametrize("at", [0, 4, 9])
def test_a_schedule_goes_on_where_its_checkpoint_left_it(traced: fxprune.TracedModule, at: int) -> None:
    def build(module: fxprune.TracedModule, **kwargs: Any) -> fxprune.Schedule:
        return fxprune.Schedule(module, NAMES, L1, **kwargs)

    straight = build(copy.deepcopy(traced), amount=0.8, start=1, stop=8, every=3)
    want = [straight.step() for _ in range(12)]
    first = build(traced, amount=0.8, start=1, stop=8, every=3)
    got = [first.step() for _ in range(at)]
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = build(copy.deepcopy(traced), amount=0.1)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.state_dict() == first.state_dict()
    assert resumed.amount == first.amount
    assert got + [resumed.step() for _ in range(12 - at)] == want


def test_the_reports_of_a_schedule_of_channels_go_on_with_it(traced: fxprune.TracedModule) -> None:
    def build(module: fxprune.TracedModule) -> fxprune.Schedule:
        return fxprune.Schedule(
            module, None, lambda gone: fxprune.prune.channels(module, macs=1 - gone, round_to=1), 0.5, stop=4, every=2
        )

    first = build(traced)
    for _ in range(3):
        first.step()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = build(copy.deepcopy(traced))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.reports == first.reports
    assert resumed.reached == first.reached > 0
    assert [resumed.step() for _ in range(2)] == [first.step() for _ in range(2)]
    assert len(resumed.reports) == 3
    old = {name: value for name, value in first.state_dict().items() if name != "reports"}  # as before they were stored
    resumed.load_state_dict(old)
    assert resumed.reports == []


def test_a_foreign_or_damaged_state_is_refused(traced: fxprune.TracedModule) -> None:
    schedule = fxprune.Schedule(traced, NAMES, L1, 0.5)
    good = schedule.state_dict()
    for bad in (
        {},
        {"last_epoch": 3},
        None,
        good | {"calls": -1},
        good | {"curve": "spline"},
        good | {"amount": 2.0},
        good | {"reports": [{}]},
        good | {"reports": 3},
        good | {"reports": [3]},
    ):
        with pytest.raises(ArtifactError):
            schedule.load_state_dict(bad)  # type: ignore[arg-type]
        assert schedule.state_dict() == good


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"amount": 1.5}, ArgumentError),
        ({"amount": float("nan")}, ArgumentError),
        ({"amount": 1}, ArgumentTypeError),
        ({"amount": "half"}, ArgumentTypeError),
        ({"initial": 0.6}, ArgumentError),
        ({"curve": "quartic"}, ArgumentError),
        ({"curve": "exponential", "amount": 1.0}, ArgumentError),
        ({"start": 4, "stop": 3}, ArgumentError),
        ({"start": -1}, ArgumentError),
        ({"every": 0}, ArgumentError),
        ({"stop": 2.5}, ArgumentError),
        ({"scope": "layer"}, ArgumentError),
        ({"names": ()}, ArgumentError),
        ({"names": None}, ArgumentError),
        ({"names": "3.weight"}, LookupError),
        ({"request": 0.5}, ArgumentTypeError),
        ({"request": nn.Linear}, ArgumentTypeError),
        ({"request": lambda f: None, "n": 2}, ArgumentError),
        ({"dim": 0}, ArgumentTypeError),
        ({"request": prune.LnStructured, "names": "*", "n": 2, "dim": 0}, PruningError),
        ({"request": prune.LnStructured, "scope": "global", "n": 2, "dim": 0}, ArgumentTypeError),
    ],
)
def test_bad_arguments_are_refused_at_once(
    traced: fxprune.TracedModule, change: dict[str, Any], error: type[Exception]
) -> None:
    state = torch.get_rng_state()
    with pytest.raises(error) as caught:
        fxprune.Schedule(**{"traced": traced, "names": NAMES, "request": L1, "amount": 0.5} | change)
    assert isinstance(caught.value, FxpruneError)
    assert not fxprune.prune.is_pruned(traced)
    assert torch.equal(state, torch.get_rng_state())


def test_channels_go_by_a_schedule_of_macs(traced: fxprune.TracedModule) -> None:
    schedule = fxprune.Schedule(
        traced, None, lambda gone: fxprune.prune.channels(traced, macs=1 - gone, round_to=1), 0.5, stop=6, every=2
    )
    optimizer = torch.optim.SGD(traced.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    left, masks = [], dict[str, torch.Tensor]()
    for _ in range(9):
        optimizer.zero_grad()
        traced(torch.randn(4, 12)).square().mean().backward()
        optimizer.step()
        schedule.step()
        found = {name: mask.clone() for name, mask in traced.named_buffers()}
        assert all((found[name] <= mask).all() for name, mask in masks.items())
        masks = found
        before, after = fxprune.finalize(traced, align=1).plan.macs
        left.append(after / before)
    assert left == sorted(left, reverse=True)
    assert schedule.done
    assert 0.44 < left[6] <= 0.5
    assert left[8] == left[6]
    assert all(left[call] <= 1 - CURVES["cubic"](call / 6, 0.0, 0.5) for call in (0, 2, 4, 6))
