"""Latencies of groups by count, and a budget of speed whose losses they weigh; no clock of this machine has a say."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxprune
from fxprune import driver
from fxprune.channels import budget
from fxprune.channels.groups import Grouping, steps_of
from fxprune.errors import ArgumentError, ArgumentTypeError, PruningError
from fxprune.graph.interpretation import run
from fxprune.graph.names import tensor_at
from fxprune.prune.channel_curves import GroupCurves
from fxprune.prune.latency import LatencyCurve, LatencyTable
from fxprune.prune.latency.measuring import AT_ONCE
from fxprune.prune.latency.pieces import cut_out, zeroed

aten = torch.ops.aten
ENTRY, ELEMENT, CALL = 1e-6, 1e-3, 5e-4  # seconds that a weight's entry, an element of a tanh, and a call take here


def took(module: fxprune.TracedModule) -> float:
    """The seconds of a finalized module by what it computes: layers by their weights, a tanh by its elements."""
    total = CALL
    for node in module.graphs["eval"].nodes:
        if node.target is aten.linear.default:
            total += ENTRY * tensor_at(module, str(node.args[1].target)).numel()
        elif node.target is aten.tanh.default:
            total += ELEMENT * node.meta["val"].shape[-1]
    return total


class FakeClock:
    """Tells time by `took`, and counts what it was asked for."""

    def __init__(self, noise: float = 0.0) -> None:
        self.noise, self.sets = noise, 0

    def whole(self, traced: fxprune.TracedModule) -> float:
        return took(fxprune.finalize(traced, verify=False))

    def parts(self, sets: Sequence[Sequence[fxprune.TracedModule]], is_sure: Any) -> list[np.ndarray]:
        self.sets += len(sets)
        draws = np.random.default_rng(0)
        return [
            np.array([[took(module) for module in each]] * 20) + self.noise * draws.random((20, len(each)))
            for each in sets
        ]


def use(monkeypatch: pytest.MonkeyPatch, clock: FakeClock) -> FakeClock:
    """Let a clock stand for onnxruntime's."""

    @contextlib.contextmanager
    def fake_clock(**options: Any) -> Iterator[FakeClock]:
        yield clock

    @contextlib.contextmanager
    def stopwatch(traced: fxprune.TracedModule, **options: Any) -> Iterator[Any]:
        def measure(masks: Mapping[str, torch.Tensor]) -> float:
            candidate = copy.deepcopy(traced)
            driver.insert_masks(candidate, masks)
            return clock.whole(traced) / clock.whole(candidate)

        yield measure

    monkeypatch.setattr(driver, "clock", fake_clock)
    monkeypatch.setattr(driver, "stopwatch", stopwatch)
    return clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    return use(monkeypatch, FakeClock())


class Residual(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.norm, self.wide, self.activation, self.narrow = (
            nn.LayerNorm(8),
            nn.Linear(8, 32),
            activation,
            nn.Linear(32, 8),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.narrow(self.activation(self.wide(self.norm(x))))


def blocks(*activations: nn.Module) -> fxprune.TracedModule:
    torch.manual_seed(0)
    model = nn.Sequential(*(Residual(each) for each in activations), nn.Linear(8, 4)).eval()
    return fxprune.trace(model, torch.randn(2, 8), modes=("eval",))


@pytest.fixture
def traced() -> fxprune.TracedModule:
    """Two blocks of as many MACs, of which one takes much more time."""
    return blocks(nn.ReLU(), nn.Tanh())


def gone(report: fxprune.ChannelReport) -> list[int]:
    return [masked for masked, _ in report.removed.values()]


def test_layers_of_the_same_form_are_measured_once(clock: FakeClock) -> None:
    table = fxprune.latency_table(blocks(*(nn.Tanh() for _ in range(4)), nn.ReLU()))
    assert clock.sets == table.pieces == 2
    assert len(table.curves) == 5
    assert len({curve.seconds for curve in table.curves}) == 2
    assert "latencies of 5 of 5 groups, 2 pieces" in str(table)


def test_a_curve_is_what_the_clock_says_of_the_layers_that_touch_the_group(
    clock: FakeClock, traced: fxprune.TracedModule
) -> None:
    relu, tanh = fxprune.latency_table(traced).curves
    units = np.arange(33)
    for curve, unit in ((relu, 16 * ENTRY), (tanh, 16 * ENTRY + ELEMENT)):
        assert curve.counts == (0, 8, 16, 24)
        assert curve.seconds[0] == pytest.approx(CALL + 32 * unit)
        assert np.allclose(curve.saved(), units * unit)


def test_units_go_where_they_save_time(clock: FakeClock, traced: fxprune.TracedModule) -> None:
    sensitivity = fxprune.sensitivity(traced, torch.randn(64, 8), distance="error")
    found = {}
    for prices in ("macs", "latency"):
        candidate = copy.deepcopy(traced)
        report = fxprune.prune.channels(candidate, speedup=1.5, importance=sensitivity, prices=prices)
        dense, pruned = clock.whole(traced), clock.whole(candidate)
        assert report.speedup == pytest.approx(dense / pruned)
        assert report.speedup >= 1.5
        found[prices] = gone(report)
        assert (report.latencies is None) == (prices == "macs")
    assert found["macs"][0] > found["latency"][0]
    assert sum(found["latency"]) < sum(found["macs"])


def test_a_table_serves_every_budget_without_being_measured_again(
    clock: FakeClock, traced: fxprune.TracedModule
) -> None:
    batches = torch.randn(64, 8)
    sensitivity = fxprune.sensitivity(traced, batches, distance="error")
    first = fxprune.prune.channels(copy.deepcopy(traced), speedup=1.3, importance=sensitivity, prices="latency")
    measured = clock.sets
    table = first.latencies
    assert table is not None
    for wanted in (1.3, 1.6):
        again = copy.deepcopy(traced)
        report = fxprune.prune.channels(again, speedup=wanted, importance=sensitivity, prices=table)
        assert report.latencies is table
        if wanted == 1.3:
            assert gone(report) == gone(first)
    assert clock.sets == measured


def test_data_of_a_table_gives_it_back(clock: FakeClock, traced: fxprune.TracedModule) -> None:
    table = fxprune.latency_table(traced)
    again = LatencyTable.from_dict(json.loads(json.dumps(table.to_dict())))
    assert again.to_dict() == table.to_dict()
    assert again.table() == table.table()
    sensitivity = fxprune.sensitivity(traced, torch.randn(64, 8), distance="error")
    report = fxprune.prune.channels(traced, speedup=1.3, importance=sensitivity, prices=again)
    assert type(report).from_dict(json.loads(json.dumps(report.to_dict()))).to_dict() == report.to_dict()
    assert "prices: latencies of 2 of 2 groups" in str(report)


def test_what_is_too_noisy_is_priced_by_macs_and_the_table_says_so(
    monkeypatch: pytest.MonkeyPatch, traced: fxprune.TracedModule
) -> None:
    use(monkeypatch, FakeClock(noise=10.0))
    table = fxprune.latency_table(traced)
    assert [curve.why for curve in table.curves] == ["too noisy", "too noisy"]
    assert "by MACs: 0.wide.weight (too noisy)" in str(table)
    for group in (g for g in fxprune.channel_groups(traced) if g.reason is None):
        assert np.allclose(table.saved(group), np.arange(33) * group.macs * table.seconds_per_mac)


def test_what_time_does_not_allow_is_priced_by_macs_at_the_rate_of_the_others(clock: FakeClock) -> None:
    activations = [nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.GELU()]
    table = fxprune.latency_table(blocks(*activations, nn.LogSigmoid()), most_seconds=1e-9)
    late = [curve for curve in table.curves if curve.why]
    assert [curve.why for curve in late] == ["not measured within 1e-09 s"]
    assert clock.sets == AT_ONCE == len(activations)
    measured = [curve for curve in table.curves if not curve.why]
    assert table.seconds_per_mac == pytest.approx(sum(curve.saved()[16] for curve in measured) / (4 * 16 * 16))


def test_a_curve_never_falls_and_goes_on_as_it_was() -> None:
    curve = LatencyCurve("a", "channel", 8, (), (), (0, 2, 4, 6), (10.0, 8.0, 9.0, 4.0), (0.0, 0.1, 0.1, 0.1))
    assert np.allclose(curve.saved(), [0, 0.75, 1.5, 1.5, 1.5, 3.75, 6, 8.25, 10.5])
    assert not curve.is_noise()


def test_units_that_save_nothing_alone_go_with_the_next_ones_or_not_at_all() -> None:
    losses = np.array([0.0, 1, 2, 3, 4])
    curves = GroupCurves([], [np.array([1.0, 1.1, 1.2, 1.3])], [losses])
    (scores,) = curves.scores([np.array([0.0, 0, 0, 0, 8])])
    assert np.allclose(scores, 0.5)
    (scores,) = curves.scores([np.array([0.0, 4, 4, 5, 6])])
    assert np.allclose(scores, [0.25, 1.5, 1.5, 1.5])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.lstm, self.last = (
            nn.Linear(5, 12),
            nn.LSTM(12, 8, 2, batch_first=True, bidirectional=True),
            nn.Linear(16, 3),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.lstm(self.first(x).relu())[0])


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, groups=4)
        self.deep, self.last = nn.Conv2d(64, 64, 3, groups=64), nn.Conv2d(64, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.deep(self.grouped(self.stem(x)).relu())
        return self.last(x.view(x.shape[0], 8, 8, *x.shape[2:]).transpose(1, 2).flatten(1, 2))


MODELS = {
    "encoder": (lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), (3, 6, 16)),
    "recurrent": (Recurrent, (4, 3, 5)),
    "grouped": (Grouped, (2, 3, 9, 9)),
}


def half_of(groups: Sequence[fxprune.ChannelGroup]) -> np.ndarray:
    """The first half of the units of groups that lose units together."""
    steps = steps_of(groups)
    first = steps[: len(steps) // 2]
    return first[first >= 0]


@pytest.mark.parametrize("name", MODELS)
def test_a_piece_computes_what_the_whole_does_and_shrinks_exactly(name: str) -> None:
    build, shape = MODELS[name]
    torch.manual_seed(0)
    x = torch.randn(shape).double()
    traced = fxprune.trace(build().double().eval(), x, modes=("eval",))
    grouping = Grouping(traced)
    values: dict[Any, Any] = {}
    run(traced.graphs["eval"], lambda target: tensor_at(traced, target), [x], watch=values.__setitem__)
    tried = 0
    for group in (each for each in grouping.groups if each.reason is None and each.size > 1):
        own = [each for each in grouping.groups if each is group or (group.block >= 0 and each.block == group.block)]
        touched = grouping.units.dead(np.concatenate([each.units for each in own]))
        piece = cut_out(grouping, values, touched)
        computed = piece.module(*piece.inputs)
        wholes = [value for value in values.values() if isinstance(value, torch.Tensor) and value.numel()]
        for value in computed:
            assert any(value.shape == other.shape and bool((value - other).abs().max() < 1e-9) for other in wholes), (
                group
            )
        small = fxprune.trace(piece.module, piece.inputs, dynamic_shapes=None, modes=("eval",))
        dead = grouping.units.dead(half_of(own))
        driver.insert_masks(small, zeroed(piece, budget.masks(grouping, grouping.consistency.settle(~dead))))
        final = fxprune.finalize(small, align=1)
        for before, after in zip(small(*piece.inputs), final(*piece.inputs), strict=True):
            assert (before - after).abs().max() < 1e-9
        assert sum(p.numel() for p in final.parameters()) < sum(p.numel() for p in piece.module.parameters())
        tried += 1
    assert tried > 1


def test_layers_that_lose_nothing_alone_are_named_and_priced_by_macs(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = blocks(nn.Tanh())
    monkeypatch.setattr(driver, "finalize", lambda candidate, **options: candidate)
    table = fxprune.latency_table(traced)
    assert all("lose no channels without the layers before them" in curve.why for curve in table.curves)
    assert "cannot be run alone" in table.table()


def test_a_cut_of_a_piece_is_that_of_the_whole(clock: FakeClock) -> None:
    traced = blocks(nn.Tanh())
    grouping = Grouping(traced)
    x = torch.randn(2, 8)
    values: dict[Any, Any] = {}
    run(traced.graphs["eval"], lambda target: tensor_at(traced, target), [x], watch=values.__setitem__)
    (group,) = (each for each in grouping.groups if each.reason is None)
    piece = cut_out(grouping, values, grouping.units.dead(group.units))
    masks = {"0.wide.weight": torch.ones(32, 8), "0.wide.bias": torch.ones(32), "1.weight": torch.ones(4, 8)}
    masks["0.wide.weight"][:5], masks["0.wide.bias"][:5] = 0, 0
    own = zeroed(piece, masks)
    assert len(own) == 2
    small = fxprune.trace(piece.module, piece.inputs, dynamic_shapes=None, modes=("eval",))
    whole = fxprune.finalize(small)
    driver.insert_masks(small, own)
    final = fxprune.finalize(small, align=1)
    assert took(whole) - took(final) == pytest.approx(5 * (16 * ENTRY + ELEMENT))
    for before, after in zip(small(*piece.inputs), final(*piece.inputs), strict=True):
        assert (before - after).abs().max() < 1e-6


def test_layers_that_write_into_what_they_are_given_have_no_piece() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
            self.register_buffer("seen", torch.zeros(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.first(x)
            self.seen.copy_(hidden.sum(0))
            return self.last(hidden)

    x = torch.randn(2, 4)
    traced = fxprune.trace(Counting().eval(), x, modes=("eval",))
    grouping = Grouping(traced)
    values: dict[Any, Any] = {}
    run(traced.graphs["eval"], lambda target: tensor_at(traced, target), [x], watch=values.__setitem__)
    with pytest.raises(PruningError, match="writes into"):
        cut_out(grouping, values, np.ones(grouping.found.classes.count, bool))


def test_groups_that_lose_units_together_share_what_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entries(FakeClock):
        def parts(self, sets: Sequence[Sequence[fxprune.TracedModule]], is_sure: Any) -> list[np.ndarray]:
            return [np.array([[sum(p.numel() for p in m.parameters()) for m in each]] * 5, float) for each in sets]

    use(monkeypatch, Entries())
    torch.manual_seed(0)
    traced = fxprune.trace(Recurrent().eval(), torch.randn(4, 3, 5), modes=("eval",))
    table = fxprune.latency_table(traced)
    shares: dict[tuple[float, ...], list[float]] = {}
    for curve in table.curves:
        assert not curve.why, curve
        shares.setdefault(curve.seconds, []).append(curve.share)
    assert max(map(len, shares.values())) > 1
    assert all(sum(own) == pytest.approx(1) for own in shares.values())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"macs": 0.5, "importance": "sensitivity", "prices": "latency"}, ArgumentError, "would be ignored.*speedup"),
        ({"speedup": 1.5, "prices": "latency"}, ArgumentError, "would be ignored.*obs"),
        ({"speedup": 1.5, "importance": "sensitivity", "prices": "time"}, ArgumentError, "prices='time'.*latency"),
        ({"speedup": 1.5, "importance": "sensitivity", "prices": 3}, ArgumentError, "prices is a int"),
        (
            {"speedup": 1.5, "importance": "sensitivity", "prices": "table", "threads": 2},
            ArgumentError,
            "Measure again",
        ),
        ({"speedup": 1.5, "importance": "sensitivity", "prices": "other"}, PruningError, "has nothing of"),
    ],
)
def test_prices_that_cannot_be_used_are_refused_and_insert_no_mask(
    clock: FakeClock, traced: fxprune.TracedModule, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    sensitivity = fxprune.sensitivity(traced, torch.randn(64, 8), distance="error")
    given = dict(options)
    if given.get("importance") == "sensitivity":
        given["importance"] = sensitivity
    if given["prices"] == "table":
        given["prices"] = fxprune.latency_table(traced)
    if given["prices"] == "other":
        given["prices"] = fxprune.latency_table(traced, targets="0.wide")
    with pytest.raises(error, match=message):
        fxprune.prune.channels(traced, **given)
    assert not fxprune.prune.is_pruned(traced)


def test_options_of_a_table_that_cannot_be_used_are_refused(traced: fxprune.TracedModule) -> None:
    with pytest.raises(ArgumentTypeError, match="providers"):
        fxprune.latency_table(traced, providers="CPUExecutionProvider")
    with pytest.raises(ArgumentTypeError, match="most_seconds"):
        fxprune.latency_table(traced, most_seconds="long")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="most_seconds"):
        fxprune.latency_table(traced, most_seconds=0)


def test_onnxruntime_times_pieces_of_every_kind() -> None:
    torch.manual_seed(0)
    traced = fxprune.trace(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval(), torch.randn(1, 6, 16))
    table = fxprune.latency_table(traced.eval(), batch=2)
    assert table.whole_seconds > 0
    assert all(seconds > 0 for curve in table.curves for seconds in curve.seconds)
    assert all(curve.counts for curve in table.curves)
