"""The demo: its rows, what makes it fail, and that a seed fixes it."""

import contextlib
import copy
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import onnx
import pytest
import torch
from rich.console import Console

import fxprune
from fxprune import cli, demo
from fxprune.demo import experiment
from fxprune.demo.data import load_split
from fxprune.demo.measuring import eager_twin
from fxprune.demo.results import accuracy_failures

pytest.importorskip("sklearn")
TIMES = {"seconds", "latency_ms", "latency", "output"}


def command(*arguments):
    run = subprocess.run(
        [sys.executable, "-m", "fxprune.cli", "demo", *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=Path(fxprune.__file__).parents[1],
    )  # fmt: skip
    assert "Traceback" not in run.stderr
    return run


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


class Run(NamedTuple):
    """What a command gave."""

    returncode: int
    stdout: str
    stderr: str


def few_digits(seed):
    return tuple(part._replace(images=part.images[:200], labels=part.labels[:200]) for part in load_split(seed))


@pytest.fixture
def _few_digits(monkeypatch):
    monkeypatch.setattr(experiment, "load_split", few_digits)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """One run too short to learn, on few digits: everything but the accuracy holds."""
    folder = tmp_path_factory.mktemp("demo") / "made" / "by it"
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as exit_,
    ):
        patch.setattr(experiment, "load_split", few_digits)
        cli.main(["demo", "--json", "--epochs", "1", "--seed", "5", "--output", str(folder)])
    return folder, Run(exit_.value.code, out.getvalue(), err.getvalue())


def test_json_is_all_of_stdout_and_is_kept(short):
    folder, run = short
    found = json.loads(run.stdout)
    assert found == json.loads((folder / "report.json").read_text())
    assert (found["seed"], found["epochs"], found["output"]) == (5, 1, str(folder))
    assert "dense: train 1/1\n" in run.stderr
    assert "Warning" not in run.stderr


def test_every_stage_has_its_row(short):
    folder, run = short
    rows = {(row["variant"], row["stage"]): row for row in json.loads(run.stdout)["stages"]}
    assert list(rows) == [(v.name, s) for v in demo.VARIANTS for s in ("eager", "traced", "finalized", "onnx")]
    for (variant, stage), row in rows.items():
        assert row["accuracy"] == rows[variant, "eager"]["accuracy"]
        if stage == "onnx":
            assert row["file_bytes"] == (folder / f"{variant}.onnx").stat().st_size
            assert row["latency_ms"] > 0
            assert row["max_difference"] < 1e-4
        elif stage == "finalized" and variant in ("rows", "budget"):
            assert row["max_difference"] < 1e-5
            assert row["parameters"] < 0.7 * rows["dense", "finalized"]["parameters"]
            assert row["macs"] < 0.6 * rows[variant, "eager"]["macs"]
        elif stage != "eager":
            assert row["max_difference"] == 0
    # eager carries the norms' magnitudes besides: one for the head's each row
    parameters = sum(p.numel() for p in demo.DigitNet().parameters())
    assert [rows["unstructured", s]["parameters"] for s in ("eager", "traced", "finalized")] == [
        parameters + 10, parameters + 10, parameters
    ]  # fmt: skip


def test_the_way_of_the_trained_network_is_measured_step_by_step(short):
    found = json.loads(short[1].stdout)
    rows = {(row["variant"], row["stage"]): row for row in found["stages"]}
    ways = found["milestones"]
    assert [(way["variant"], way["after"]) for way in ways] == [
        ("budget", "pruned"), ("budget", "repaired"), ("budget", "trained on")
    ]  # fmt: skip
    assert {way["macs"] for way in ways} == {rows["budget", "finalized"]["macs"]}
    assert 0.49 < ways[0]["macs"] / rows["dense", "finalized"]["macs"] <= 0.5
    assert ways[-1]["accuracy"] == rows["budget", "finalized"]["accuracy"]
    assert "budget: repaired 1/1\n" in short[1].stderr
    assert "budget: train 1/1\n" in short[1].stderr


def test_zeros_are_where_the_masks_were(short):
    folder, run = short
    layers = json.loads(run.stdout)["layers"]
    masked = {name: counts for name, counts in layers.items() if name.startswith("block")}
    assert layers.keys() - masked.keys() == {"stem.weight", "head.weight"}
    assert all(counts["unstructured"] == 0 for name, counts in layers.items() if name not in masked)
    total = sum(counts["size"] for counts in masked.values())
    assert sum(counts["unstructured"] for counts in masked.values()) == pytest.approx(0.8 * total, abs=2)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(folder / "unstructured.onnx").graph.initializer}
    assert int((stored["head.weight"] == 0).sum()) == 0
    assert not [name for name in stored if "mask" in name or "parametrizations" in name]


def test_too_short_a_training_fails_by_name(short):
    _, run = short
    failures = json.loads(run.stdout)["failures"]
    assert run.returncode == 1
    assert failures[0].startswith("accuracy: dense has ")
    assert not [failure for failure in failures if not failure.startswith("accuracy: ")]
    assert all(f"failed: {failure}" in run.stderr for failure in failures)


def of_variants(result, names):
    """The part of a result that is about these variants, without times."""
    found = without_times(result)
    return {
        "stages": [row for row in found["stages"] if row["variant"] in names],
        "layers": {key: {k: v for k, v in c.items() if k in (*names, "size")} for key, c in found["layers"].items()},
        "ratios": {name: left for name, left in found["ratios"].items() if name in names},
    }


@pytest.mark.usefixtures("_few_digits")
@pytest.mark.parametrize("names", [("dense",), pytest.param(("dense", "unstructured"), marks=pytest.mark.slow)])
def test_a_seed_fixes_the_result_and_nothing_outside_changes(short, names, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "VARIANTS", demo.VARIANTS[: len(names)])  # each starts anew, from the seed
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    again = demo.run(tmp_path, seed=5, epochs=1).to_dict()
    assert of_variants(again, names) == of_variants(json.loads(short[1].stdout), names)
    assert len(again["stages"]) == 4 * len(names)
    assert again.keys() == json.loads(short[1].stdout).keys()
    assert (tmp_path / "dense.onnx").read_bytes() == (short[0] / "dense.onnx").read_bytes()
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(load_split(5)[1].labels, load_split(6)[1].labels)


@pytest.mark.usefixtures("_few_digits")
def test_equality_and_export_fail_by_name(monkeypatch, tmp_path, capsys):
    def broken_export(final, path):
        raise fxprune.errors.ExportError("the disk is full")

    def broken_twin(traced, model, original=eager_twin):
        twin = original(traced, model)
        with torch.no_grad():
            twin.head.bias += 0.125
        return twin

    variants = (demo.VARIANTS[0], demo.VARIANTS[3])  # the same bits are expected of one, rounding is allowed the other
    monkeypatch.setattr(experiment, "VARIANTS", variants)
    monkeypatch.setattr(fxprune.export, "to_onnx", broken_export)
    monkeypatch.setattr(experiment, "eager_twin", broken_twin)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["demo", "--epochs", "1", "--quiet", "--output", str(tmp_path)])
    shown = capsys.readouterr()
    assert exit_.value.code == 1
    for variant in variants:
        assert f"failed: export: {variant.name}: the disk is full\n" in shown.err
        assert f"failed: equality: {variant.name}: traced differs from eager by 0.12" in shown.err
        assert f"failed: equality: {variant.name}: finalized differs" in shown.err
    assert all(line.startswith("fxprune: failed: ") for line in shown.err.splitlines())
    assert "in blocks that run fast" in shown.out
    assert max(map(len, shown.out.splitlines()[:10])) <= 80


def test_a_result_is_judged_by_its_worst_stage():
    def judged(*accuracies):
        stages = [demo.Stage("dense", "eager", 0.99)]
        stages += [demo.Stage("unstructured", f"stage{i}", a) for i, a in enumerate(accuracies)]
        return accuracy_failures(stages)

    assert judged(0.985, 1.0) == []
    assert judged(0.985, 0.979) == [
        "accuracy: unstructured has 97.90% (stage1), more than a point below the dense 99.00%"
    ]


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_output_that_cannot_be_written_stops_it_before_the_training(place, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    monkeypatch.setattr(experiment, "load_split", lambda seed: pytest.fail("went on"))
    with pytest.raises(SystemExit) as exit_:
        cli.main(["demo", "--output", str(tmp_path / place)])
    assert exit_.value.code == 1
    shown = capsys.readouterr()
    assert shown.err.startswith(f"fxprune: the output folder '{tmp_path / place}' cannot be written: ")
    assert shown.out == ""
    assert (tmp_path / "file").read_text() == "kept"


def test_without_scikit_learn_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(fxprune.FxpruneError, match=r"pip install 'fxprune\[demo\]'"):
        demo.run(tmp_path)


def test_no_epochs_are_refused(tmp_path):
    with pytest.raises(fxprune.FxpruneError, match="epochs=0"):
        demo.run(tmp_path / "new", epochs=0)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("terminal", "quiet"), [(False, False), (False, True), (True, False), (True, True)])
def test_progress(terminal, quiet):
    text = io.StringIO()
    with demo.progress(Console(file=text, force_terminal=terminal, width=80), quiet) as step:
        for done in range(9):
            step("train", done, 8)
    shown = text.getvalue()
    if quiet:
        assert "train" not in shown
    elif terminal:
        assert "100%" in shown
    else:
        assert shown == "train 2/8\ntrain 4/8\ntrain 6/8\ntrain 8/8\n"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pruned_stays_within_a_point_of_dense(seed, tmp_path):
    run = command("--json", "--quiet", "--seed", seed, "--output", tmp_path)
    found = json.loads(run.stdout)
    assert (run.returncode, found["failures"], run.stderr) == (0, [], "")
    dense, *others = (next(r for r in found["stages"] if r["variant"] == v.name) for v in demo.VARIANTS)
    assert dense["accuracy"] > 0.97
    assert all(pruned["accuracy"] >= dense["accuracy"] - 0.01 for pruned in others)
    pruned, repaired, _ = (way["accuracy"] for way in found["milestones"])
    assert pruned < repaired - 0.1
    assert repaired >= dense["accuracy"] - 0.01


def test_the_eager_twin_has_the_biases_that_the_repair_made():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, bias=False), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1))
    traced = fxprune.trace(copy.deepcopy(model), torch.randn(2, 1, 8, 8))
    fxprune.prune.custom_from_mask(traced, "2.weight", (torch.arange(8).reshape(2, 4, 1, 1) % 3 > 0).float())
    fxprune.prune.custom_from_mask(traced, "0.weight", (torch.arange(36).reshape(4, 1, 3, 3) % 3 > 0).float())
    fxprune.reconstruct(traced, [torch.randn(64, 1, 8, 8) + 1])
    assert "0.bias" in traced.state_dict()
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(eager_twin(traced, model).eval()(x), traced.eval()(x))
