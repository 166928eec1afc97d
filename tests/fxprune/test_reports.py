"""Every result prints in a few lines, has a full table, and is plain data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as eager_prune
from torch.nn.utils import weight_norm

import fxprune
from fxprune.callbacks import Pruning
from fxprune.demo.results import Result, Stage
from fxprune.export import Report, Row
from fxprune.prune.latency import LatencyCurve, LatencyTable
from fxprune.recipes import Outcome
from fxprune.reports import Readable, change, columns, counted, first_of, number, plain

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LINES, WIDTH = 10, 300


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 3), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(256, 5)).eval()


def _results(folder: Path) -> dict[str, Readable]:
    model = network()
    traced = fxprune.trace(model, IMAGES)
    groups = fxprune.channel_groups(traced)
    masked = fxprune.prune.channels(traced, macs=0.5)
    schedule = fxprune.Schedule(traced, None, lambda gone: fxprune.prune.channels(traced, macs=1 - gone), 0.5)
    schedule.step()
    repaired = fxprune.trace(network(), IMAGES)
    fxprune.prune.channels(repaired, macs=0.5)
    final = fxprune.finalize(traced)
    assert final.plan is not None
    onnx = fxprune.export.to_onnx(final, folder / "model.onnx")
    program = fxprune.export.to_program(final, folder / "model.pt2")
    agreeing = fxprune.compare(traced, final, onnx.path, inputs=IMAGES)
    with torch.no_grad():
        model[5].bias += 1
    differing = fxprune.compare(traced, onnx.path, inputs=IMAGES)
    pruning = Pruning(schedule)
    times = fxprune.export.bench([onnx.path] * 9, rounds=2, warmup=0)
    eager = nn.Sequential(*(nn.Linear(3, 3) for _ in range(5)))
    for layer in eager:
        eager_prune.l1_unstructured(weight_norm(layer), "weight_v", amount=0.5)  # type: ignore[no-untyped-call]
    assert differing.first_divergence is not None
    stages = [Stage("dense", "eager", 0.99, 100), Stage("pruned", "onnx", 0.98, 50, file_bytes=10)]
    curve = LatencyCurve("a", "channel", 8, ("a[0]",), tuple(range(8)), (0, 4), (1e-3, 5e-4), (0.0, 1e-5))
    priced = replace(curve, name="b", counts=(), why="too few units to cut")
    return {
        "groups": groups, "group": groups[0], "group that stays": groups[-1], "channels": masked, "schedule": schedule,
        "pruning": pruning, "finished": pruning.finish(),
        "schedule of entries": fxprune.Schedule(traced, "5.weight", eager_prune.L1Unstructured, 0.5),
        "reconstruction": fxprune.reconstruct(repaired, IMAGES), "plan": final.plan,
        "sensitivity": fxprune.sensitivity(repaired, IMAGES),
        "latencies": LatencyTable((curve, priced), 2e-3, 1e-9, 1, 1, ("CPUExecutionProvider",), "", 1, 2.5),
        "empty plan": fxprune.ChannelPlan(), "onnx": onnx, "program": program, "agreeing": agreeing,
        "unverified": replace(onnx, comparison=None, notes=("one", "two", "three")),
        "differing": differing, "divergence": differing.first_divergence,
        "not finite": Report("a", "eval", (Row("b", 0, "y", (2,), "float32", float("nan"), float("inf"), False),)),
        "times": times, "time": times[0], "contents": fxprune.export.inspect(onnx.path),
        "profile": fxprune.export.profile(onnx.path, inputs=IMAGES),
        "faults": fxprune.diagnose(eager), "fault": fxprune.diagnose(eager)[0], "no faults": fxprune.Faults(),
        "demo": Result(0, 1, "folder", stages, ratios={"pruned": {"MACs": 0.5}}),
        "recipe": Outcome({"model": {"source": "nets:trained"}}, {}, {"trace": {"seconds": 0.5}}, "out of reach"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Readable]:
    return _results(tmp_path_factory.mktemp("results"))


def test_every_result_prints_in_a_few_lines_and_repr_in_one(results: dict[str, Readable]) -> None:
    for name, result in results.items():
        text = str(result)
        assert text, name
        assert len(text.splitlines()) <= LINES, f"{name}:\n{text}"
        assert "\n" not in repr(result), name
        assert len(repr(result)) <= WIDTH, f"{name}: {result!r}"
        assert repr(result).startswith(f"<{type(result).__name__}: "), name


def test_every_result_has_a_table_of_text(results: dict[str, Readable]) -> None:
    for name, result in results.items():
        text = result.table()
        assert text.strip(), name
        assert len(text) >= len(str(result).splitlines()[0]), name


def test_every_result_is_plain_data(results: dict[str, Readable]) -> None:
    for name, result in results.items():
        data = result.to_dict()
        assert json.loads(json.dumps(data, allow_nan=False)) == data, name


def test_every_class_with_the_three_methods_is_shown_here(results: dict[str, Readable]) -> None:
    def below(kind: type) -> set[type]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    shown = {type(result) for result in results.values()}
    own = {kind for kind in below(Readable) if kind.__module__.startswith("fxprune")}
    telling = {kind for kind in own if {"__str__", "table", "to_dict"} & vars(kind).keys()}
    assert telling - shown <= {Readable}


def test_the_plan_prints_the_sums_and_its_table_every_axis(results: dict[str, Readable]) -> None:
    plan = results["plan"]
    assert isinstance(plan, fxprune.ChannelPlan)
    (before, after), (dense, left) = plan.macs, plan.parameters
    assert f"MACs {before:,} -> {after:,} ({after / before:.3f})" in str(plan)
    assert f"parameters {dense:,} -> {left:,}" in str(plan)
    assert "one sample of 3x8x8" in str(plan)
    gone = plan.removed
    assert f"{gone['0.weight'][0] + gone['3.weight'][0]} of 48 rows of 2 weights removed" in str(plan)
    lines = [line.split() for line in plan.table().splitlines()]
    for name, axes in gone.items():
        for axis, count in axes.items():
            full = plan.shapes[name][axis]
            assert [name, str(axis), str(full), str(full - count)] in lines
    assert fxprune.ChannelPlan.from_json(json.dumps(plan.to_dict())).to_dict() == plan.to_dict()
    assert json.loads(plan.to_json()) == plan.to_dict()


def test_the_export_prints_file_size_opset_and_how_it_was_verified(results: dict[str, Readable]) -> None:
    report = results["onnx"]
    assert isinstance(report, fxprune.export.ExportReport)
    head, verdict, *_ = str(report).splitlines()
    assert head == f"{report.path}: {report.path.stat().st_size:,} bytes, opset {report.opset}, float32"
    assert report.comparison is not None
    worst = max(row.max_rel or 0 for row in report.comparison.rows)
    calls = len({row.call for row in report.comparison.rows})
    assert f"run in onnxruntime on {calls} calls, 1 output" in verdict
    assert "run in torch on" in str(results["program"])
    assert number(worst) in verdict
    assert report.comparison.table() in report.table()
    assert report.to_dict()["size_bytes"] == report.to_dict()["size"] == report.path.stat().st_size
    assert "not verified" in str(results["unverified"])
    assert "note: three" in results["unverified"].table()
    assert "note: three" not in str(results["unverified"])


def test_a_comparison_prints_its_verdict(results: dict[str, Readable]) -> None:
    assert "model.onnx agree against TracedModule (0), eval mode: 2 outputs, largest difference " in str(
        results["agreeing"]
    )
    assert "1 of 1 outputs differ against TracedModule, eval mode: model.onnx, output: " in str(results["differing"])
    assert "first difference of model.onnx" in str(results["differing"])
    assert str(results["divergence"]) in results["differing"].table()


def test_many_faults_and_files_print_the_first_of_them(results: dict[str, Readable]) -> None:
    faults, times = results["faults"], results["times"]
    assert isinstance(faults, fxprune.Faults)
    assert isinstance(times, fxprune.export.Latencies)
    assert f"and {len(faults) - 3} faults more" in str(faults)
    assert faults.table().count("cause:") == len(faults) > 3
    assert "and 3 files more" in str(times)
    assert len(times.table().splitlines()) == 1 + len(times)
    assert times.to_dict()["files"][0]["median_ms"] == times[0].median


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (columns([("a", "b"), ("long", "")]), "a     b\nlong"),
        (change(0, 0), "0 -> 0 (0.000)"),
        (first_of("abc", 2), "a, b, ..."),
        (counted(1, "file") + counted(0, "file"), "1 file0 files"),
        (plain({1: (torch.ones(2), Path("x"), float("inf"), {2})}), {"1": [[1.0, 1.0], "x", "inf", [2]]}),
    ],
)
def test_how_results_are_written(found: object, wanted: Callable[..., object]) -> None:
    assert found == wanted


def test_what_holds_a_whole_analysis_has_a_short_repr() -> None:
    traced = fxprune.trace(network(), IMAGES)
    for found in (fxprune.channels.coupling(traced), fxprune.channels.analyze(traced)):
        assert len(repr(found)) < WIDTH


def test_a_choice_of_channels_prints_the_sums_and_its_table_every_group(results: dict[str, Readable]) -> None:
    report, plan = results["channels"], results["plan"]
    assert isinstance(report, fxprune.ChannelReport)
    assert isinstance(plan, fxprune.ChannelPlan)
    head, units = str(report).splitlines()
    assert head == str(plan).splitlines()[0]
    masked = {group: pair[0] for group, pair in report.removed.items()}
    assert units.startswith(f"{sum(masked.values())} of 48 units of 2 groups masked; 1 group left alone: 5.weight")
    rows = [re.split("  +", line) for line in report.table().splitlines()]
    for group, (count, size) in report.removed.items():
        assert [group, str(count), str(size)] in rows
    assert report.to_dict()["gone"] == report.gone == 1 - plan.macs[1] / plan.macs[0]
    assert "1.50 times faster" in str(replace(report, speedup=1.5))


def test_a_schedule_prints_where_it_is_and_its_table_every_report(results: dict[str, Readable]) -> None:
    schedule = results["schedule"]
    assert isinstance(schedule, fxprune.Schedule)
    assert str(schedule) == f"cubic to 0.5, after 1 call: 0.500 asked for, {schedule.reached:.3f} reached; done"
    (report,) = schedule.reports
    assert schedule.table().splitlines()[-1].split()[1:3] == ["macs", f"{report.gone:.3f}"]
    data = schedule.to_dict()
    assert data["reports"] == [report.to_dict()]
    assert data["calls"] == 1
    assert data["done"]
