"""The commands on files: export, compare, inspect, bench; their output, JSON and exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import fxprune
from fxprune import cli

MODELS = """
import torch
from torch import nn
from torch.nn.utils import prune

def pruned():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 5))
    prune.l1_unstructured(model[3], "weight", 0.9)
    return model

class inner:
    @staticmethod
    def other():
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 5))

def number():
    return 3

made = nn.Linear(3, 2)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "cli_models.py").write_text(MODELS)
    return folder


@pytest.fixture(autouse=True)
def _here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def outcome(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            cli.main(list(arguments))
        return int(exit_.value.code or 0), *capsys.readouterr()

    return outcome


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, str]:
    """Written by the command line itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, *options in (
            ("a.onnx",), ("a.pt2",), ("a.pt",), ("sparse.onnx", "--sparse"), ("half.onnx", "--precision", "float16"),
        ):  # fmt: skip
            with pytest.raises(SystemExit) as done:
                cli.main(["export", "cli_models:pruned", name, "--inputs", "2x3x4x4", *options])
            assert not done.value.code
    return {path.name: str(path) for path in folder.iterdir()}


def test_export_reports_the_file_and_its_verification(run: Any, folder: Path) -> None:
    code, out, err = run("export", "cli_models:pruned", "new.onnx", "--inputs", "2x3x4x4")
    assert (code, err) == (0, "")
    size = (folder / "new.onnx").stat().st_size
    assert out.startswith(f"new.onnx: {size:,} bytes\nagainst TracedModule, eval mode\n")
    np.savez(folder / "batch.npz", np.random.default_rng(0).standard_normal((4, 3, 4, 4)).astype("f4"))
    options = ("--precision", "int8", "--calibration", "batch.npz", "--json")
    code, out, _ = run("export", "cli_models:pruned", "int8.onnx", "--inputs", "2x3x4x4", *options)
    report = json.loads(out)
    assert (code, report["precision"], report["comparison"]["ok"]) == (0, "int8", True)
    assert report["size"] < 0.5 * size


def test_compare_agrees_and_differs(run: Any, files: dict[str, str], folder: Path) -> None:
    code, out, err = run("compare", "cli_models:pruned", "a.onnx", "a.pt2", "a.pt", "half.onnx", "--inputs", "2x3x4x4")
    assert (code, err) == (0, "")
    assert out.count(" yes") == 4
    code, out, _ = run("compare", "cli_models:inner.other", "a.onnx", "--inputs", "2x3x4x4", "--reproduce", "why.py")
    assert code == 1
    assert "NO limit" in out
    assert "first difference of a.onnx: node `conv2d`" in out
    assert (folder / "why.py").is_file()
    code, out, _ = run("compare", "a.onnx", "half.onnx", "--inputs", "2x3x4x4", "--rtol", "1e-9", "--json")
    assert (code, json.loads(out)["ok"]) == (1, False)


@pytest.mark.parametrize("kind", ["npz", "named", "safetensors", "shape"])
def test_forms_of_inputs(run: Any, files: dict[str, str], folder: Path, kind: str) -> None:
    x = torch.randn(2, 3, 4, 4)
    np.savez(folder / "npz.npz", x.numpy())
    np.savez(folder / "named.npz", input=x.numpy())
    safetensors.torch.save_file({"input": x}, folder / "safetensors.safetensors")
    text = {"npz": "npz.npz", "named": "named.npz", "safetensors": "safetensors.safetensors"}.get(kind, "input=2x3x4x4")
    code, out, _ = run("compare", "cli_models:pruned", "a.onnx", "--inputs", text)
    assert code == 0, out


def test_inspect(run: Any, files: dict[str, str]) -> None:
    code, out, err = run("inspect", "a.onnx")
    assert (code, err) == (0, "")
    assert "3.weight" in out
    assert "90.0%" in out
    macs = 16 * 64 * 27 + 1024 * 5
    assert f"{macs:,} multiply-adds for one sample of 3x4x4" in out
    assert "1 Conv" in out
    assert f"fxprune.version: {fxprune.__version__}" in out
    found = [json.loads(run("inspect", name, "--json")[1]) for name in ("a.onnx", "sparse.onnx", "half.onnx", "a.pt2")]
    weights = {row[0]: row for row in found[1]["tensors"]}["3.weight"]
    assert weights == ["3.weight", [5, 1024], "float32, sparse", 5120, 4608]
    assert {item["zeros"] // 100 for item in found} == {46}
    assert [item["macs"] for item in found] == [macs] * 4
    assert {item["sample"] for item in found} == {"one sample of 3x4x4"}
    assert found[3]["metadata"]["fxprune.precision"] == "float32"


def test_bench(run: Any, files: dict[str, str]) -> None:
    code, out, err = run("bench", "a.onnx", "half.onnx", "--rounds", "5", "--batch", "2")
    assert (code, err) == (0, "")
    assert "1.000" in out
    code, out, _ = run("bench", "a.onnx", "half.onnx", "--rounds", "5", "--inputs", "3x3x4x4", "--json")
    found = json.loads(out)
    assert (code, found["threads"], [item["name"] for item in found["files"]]) == (0, 1, ["a.onnx", "half.onnx"])
    assert all(item["median"] > 0 for item in found["files"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("compare", "no_such:model", "a.onnx", "--inputs", "2x3"), "No module named 'no_such'"),
        (("compare", "cli_models:no", "a.onnx", "--inputs", "2x3"), "has no attribute 'no'"),
        (("compare", "cli_models:made", "a.onnx", "--inputs", "2x3"), "'cli_models:made' is a Linear; a function"),
        (("compare", "cli_models:number", "a.onnx", "--inputs", "2x3"), "returns a int"),
        (("compare", "a.onnx", "a.pt2", "--inputs", "2xthree"), "input '2xthree' cannot be used"),
        (("compare", "a.onnx", "a.pt2", "--inputs", "2x3:int99"), "cannot be used"),
        (("compare", "a.onnx", "a.pt2", "--inputs", "no.npz"), "input 'no.npz' cannot be used"),
        (("compare", "a.onnx", "a.txt", "--inputs", "2x3x4x4"), "end in .onnx, .pt2 or .pt"),
        (("export", "a.onnx", "b.onnx", "--inputs", "2x3x4x4"), "export takes package.module:factory"),
        (("export", "cli_models:pruned", "b.txt", "--inputs", "2x3x4x4"), "must end in .onnx, .pt2 or .pt"),
        (("export", "cli_models:pruned", "b.pt2", "--inputs", "2x3x4x4", "--sparse"), "for files that end in .onnx"),
        (("export", "cli_models:pruned", "b.onnx", "--inputs", "2x3x4x4", "--precision", "int3"), "'int3' was asked"),
        (("inspect", "a.pt"), "end in .onnx or .pt2"),
        (("inspect", "no.onnx"), "cannot be read"),
        (("bench", "no.onnx"), "there is nothing of that name"),
        (("bench", "a.onnx", "--rounds", "0"), "at least 1 of each"),
    ],
)
def test_bad_input_exits_with_1(run: Any, files: dict[str, str], arguments: tuple[str, ...], says: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith("fxprune: ")
    assert says in err
    assert not Path("b.onnx").exists()
    assert "" not in sys.path[:1] or sys.path.count("") <= 1


@pytest.mark.parametrize("arguments", [("compare", "a.onnx"), ("export", "a:b", "c.onnx"), ("inspect",), ("bench",)])
def test_wrong_usage_exits_with_2(run: Any, arguments: tuple[str, ...]) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert "Usage:" in err
