"""Pruning on the command line: what is written, printed and returned."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.main import get_command

import fxprune
from fxprune import cli, driver
from fxprune.graph.expanded import is_expanded
from tests.recipe_networks import images

NETWORK = "tests.recipe_networks:network"
PLAIN = ("--importance", "l2", "--no-repair", "--inputs", "2x1x8x8")


def outcome(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    return exit_.value.code or 0, *capsys.readouterr()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples, and the network pruned by a recipe in which they are named."""
    folder = tmp_path_factory.mktemp("cli")
    np.savez(folder / "images.npz", images().numpy())
    return folder


def test_one_command_prunes_repairs_exports_and_reports(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    out = folder / "out"
    given = ("prune", NETWORK, "--data", folder / "images.npz", "--macs", 0.5, "--out", out)
    code, printed, progress = outcome(capsys, *given, "--score", "tests.recipe_networks:score", "--batch", 16)
    assert code == 0, progress
    assert "MACs" in printed
    assert "own class: model.safetensors" in printed
    assert [line.partition(" ")[2] for line in progress.splitlines()] == [
        "trace", "choose", "repair", "finalize", "export", "compare",
    ]  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert report["recipe"]["choose"]["importance"] == "obs"
    assert fxprune.compare(fxprune.load(out / "model.fxp"), out / "model.onnx", inputs=images(3)).ok


def test_a_budget_out_of_reach_exits_with_2_and_a_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, printed, _ = outcome(
        capsys, "prune", NETWORK, *PLAIN, "--macs", 0.2, "--max-per-group", 0.25, "--out", tmp_path, "--json", "--quiet"
    )
    assert code == 2
    assert "cannot be reached" in json.loads(printed)["failure"]
    assert "loosen max_per_group=0.25" in json.loads(printed)["failure"]
    assert (tmp_path / "report.json").is_file()


def test_masks_are_vectors_on_the_way_unless_told_otherwise_and_leave_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finalize, found = driver.finalize, []

    def finalized(traced: fxprune.TracedModule, **options: Any) -> fxprune.TracedModule:
        found.append([name for name, buffer in traced.named_buffers() if is_expanded(buffer)])
        return finalize(traced, **options)

    monkeypatch.setattr(driver, "finalize", finalized)
    (tmp_path / "recipe.toml").write_text(
        f'model = {{ source = "{NETWORK}", inputs = ["2x1x8x8"] }}\nrepair = {{ enabled = false }}\n'
        'choose = { macs = 0.5, importance = "l2" }\nexport = { onnx = false }\ncompare = { latency = false }\n'
    )
    folders = tmp_path / "compact", tmp_path / "full"
    assert outcome(capsys, "run", tmp_path / "recipe.toml", "--out", folders[0], "--quiet")[0] == 0
    full = "--no-compact-masks", "--macs", 0.5, "--out", folders[1], "--quiet"
    assert outcome(capsys, "prune", NETWORK, *PLAIN, *full)[0] == 0
    assert found[0] == ["0.weight_mask", "6.weight_mask"]
    assert found[1] == []
    states = [fxprune.load(each / "model.fxp").state_dict() for each in folders]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_an_error_is_one_line_and_a_traceback_where_it_is_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "other").write_text("")
    given = ("prune", NETWORK, *PLAIN, "--macs", 0.5, "--out", tmp_path)
    code, printed, told = outcome(capsys, *given)
    assert (code, printed) == (1, "")
    assert re.fullmatch(r"fxprune: '.*' is not empty: other\. .*\n", told)
    with pytest.raises(fxprune.FxpruneError, match="is not empty"):
        cli.main(["--traceback", *map(str, given)])


@pytest.mark.parametrize("command", ["prune", "sensitivity"])
def test_arrays_of_other_names_than_the_inputs_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    np.savez(tmp_path / "digits.npz", images=images().numpy(), labels=np.arange(48))
    out = ("--macs", 0.5, "--out", tmp_path / "out") if command == "prune" else ()
    code, _, told = outcome(capsys, command, NETWORK, "--data", tmp_path / "digits.npz", *out)
    assert code == 1
    for part in ("forward takes (input), and was given images, labels", "digits.npz' holds images, labels: tensors"):
        assert part in told


def test_a_budget_is_needed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, told = outcome(capsys, "prune", NETWORK, *PLAIN, "--out", tmp_path / "out")
    assert code == 1
    assert "a budget is needed: macs, parameters, speedup or amount" in told
    assert not (tmp_path / "out").exists()


def test_how_samples_are_prepared_is_not_ignored_where_there_are_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = ("prune", NETWORK, *PLAIN, "--macs", 0.5, "--shape", "1x8x8", "--out", tmp_path / "out")
    code, _, told = outcome(capsys, *given)
    assert (code, "--shape say how samples are prepared" in told) == (1, True)


def test_groups_and_sensitivity_are_printed(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    code, printed, _ = outcome(capsys, "groups", NETWORK, "--inputs", "2x1x8x8")
    assert (code, "0.weight" in printed) == (0, True)
    code, printed, _ = outcome(capsys, "sensitivity", NETWORK, "--data", folder / "images.npz", "--json")
    assert code == 0
    assert {curve["name"] for curve in json.loads(printed)["curves"]} == {"0.weight", "3.weight"}


def test_saved_modules_are_read_and_finalized(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    traced = fxprune.trace(cli.sources.model(NETWORK), images(2), modes=["eval"])
    fxprune.prune.channels(traced, macs=0.5)
    fxprune.save(traced, tmp_path / "masked.fxp")
    for name in ("small.fxp", "small.onnx"):
        code, printed, _ = outcome(capsys, "finalize", tmp_path / "masked.fxp", tmp_path / name)
        assert (code, "0.weight" in printed) == (0, True)
        assert fxprune.compare(
            traced, tmp_path / "small.onnx" if name.endswith("onnx") else traced, inputs=images(2)
        ).ok
    code, printed, _ = outcome(capsys, "load", tmp_path / "small.fxp", "--json")
    left = fxprune.load(tmp_path / "small.fxp").state_dict()
    assert json.loads(printed)["tensors"] == {name: list(tensor.shape) for name, tensor in left.items()}


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = outcome(capsys, "schema")
    assert (code, json.loads(printed)["title"]) == (0, "Recipe")


@pytest.mark.parametrize(("typed", "wanted"), [("fxprune sens", "sensitivity"), ("fxprune prune --mac", "--macs")])
def test_the_shell_completes_commands_and_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, typed: str, wanted: str
) -> None:
    for name, value in {"FXPRUNE_COMPLETE": "complete_bash", "WORDS": typed, "CWORD": str(typed.count(" "))}.items():
        monkeypatch.setenv(f"_{name}" if name.startswith("FXPRUNE") else f"COMP_{name}", value)
    monkeypatch.setattr("sys.argv", ["fxprune"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().out.split() == [wanted]


def test_whatever_takes_long_can_be_quiet_and_groups_asks_for_inputs_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    commands = get_command(cli.app).commands  # type: ignore[attr-defined]
    loud = {name for name, each in commands.items() if "--quiet" not in {o for p in each.params for o in p.opts}}
    assert loud == {"schema", "load", "inspect"}
    code, printed, told = outcome(capsys, "groups", NETWORK, "--inputs", "2x1x8x8", "--quiet")
    assert (code, "0.weight" in printed, told) == (0, True, "")
    code, _, told = outcome(capsys, "groups", NETWORK)
    assert (code, "give --inputs" in told, "data" in told) == (1, True, False)


def test_examples_of_the_help_name_commands_and_options_that_are_there() -> None:
    commands = get_command(cli.app).commands  # type: ignore[attr-defined]
    examples = [
        (name, line) for name, each in commands.items() for line in re.findall("Example: (.*)", each.help or "")
    ]
    assert {name for name, _ in examples} == set(commands)
    for name, example in examples:
        words = example.split()
        assert words[:2] == ["fxprune", name]
        commands[name].make_context(name, words[2:], resilient_parsing=True)
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known
