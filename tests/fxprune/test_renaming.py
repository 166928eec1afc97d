"""One word for one thing: old names of options work and warn, and one error says of a wrong file name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune import cli
from fxprune.calling import renamed
from fxprune.channels import analyze, remove
from fxprune.errors import ArgumentError, ArgumentTypeError, CompareError, ExportError, SuffixError
from fxprune.export import Session, bench, to_onnx, to_program, to_torchscript
from fxprune.passes import RemoveChannels

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def traced_with_dead_rows() -> fxprune.TracedModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight[2:4] = model[0].bias[2:4] = 0
    return fxprune.trace(model.eval(), X)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_onnx(traced_with_dead_rows(), tmp_path_factory.mktemp("names") / "model.onnx", verify=False).path


def _removed(**options: Any) -> tuple[int, int]:
    traced = traced_with_dead_rows()
    return remove(traced, analyze(traced, align=1), **options).macs


def _removed_by_a_pass(**options: Any) -> tuple[int, int]:
    traced = traced_with_dead_rows()
    RemoveChannels(align=1, **options)(traced)
    assert traced.plan is not None
    return traced.plan.macs


def _cut(file: Path, **options: Any) -> bool:
    model = nn.Sequential(nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3)).eval()
    traced = fxprune.trace(model, torch.randn(1, 8, 6, 6), modes=("eval",), dynamic_shapes=None)
    return fxprune.prune.channels(traced, macs=0.5, **options).gone >= 0.5


def _measured(file: Path, **options: Any) -> list[str]:
    return [latency.name for latency in bench([file], rounds=1, warmup=0, **options)]


def _outputs(file: Path, **options: Any) -> list[str]:
    return list(Session(file).run(**options))


def _scored(file: Path, **options: Any) -> list[str]:
    traced, calls = traced_with_dead_rows(), []
    scores = fxprune.importance.scores(
        traced, "*.weight", "taylor", loader=[(X, X[:, :2])] * 3, loss=lambda *both: calls.append(1) or both[0].sum(),
        **options,
    )  # fmt: skip
    return [*scores, str(len(calls))]


RENAMED: dict[str, tuple[Callable[..., object], dict[str, Any], dict[str, Any], object]] = {
    "verify of remove": (_removed, {"check": False}, {"verify": False}, (0, 0)),
    "verify of RemoveChannels": (_removed_by_a_pass, {"check": False}, {"verify": False}, (0, 0)),
    "providers of bench": (
        _measured, {"provider": "CPUExecutionProvider"}, {"providers": ["CPUExecutionProvider"]}, ["model.onnx"]),
    "max_batches of scores": (_scored, {"batches": 2}, {"max_batches": 2}, ["0.weight", "2.weight", "2"]),
    "inputs of a session": (_outputs, {"args": (X,)}, {"inputs": (X,)}, ["output"]),
    "providers of channels": (
        _cut, {"provider": "CPUExecutionProvider"}, {"providers": ("CPUExecutionProvider",)}, True),
}  # fmt: skip


@pytest.mark.parametrize("case", RENAMED.values(), ids=RENAMED)
def test_the_option_works_under_both_names_but_not_both_at_once(case: Any, file: Path) -> None:
    call, old, new, wanted = case
    arguments = (file,) if call in (_measured, _cut, _outputs, _scored) else ()
    assert call(*arguments, **new) == wanted
    assert call(*arguments, **old) == wanted
    with pytest.raises(ArgumentTypeError, match=f"Leave {next(iter(old))} out"):
        call(*arguments, **old, **new)


def test_a_renamed_option_is_not_in_the_signature() -> None:
    @renamed("old", "new", str)
    def function(new: str = "") -> str:
        return new

    assert list(inspect.signature(function).parameters) == ["new"]
    assert function("a") == function(new="a") == "a"
    assert "provider" not in inspect.signature(bench).parameters
    assert "check" not in inspect.signature(RemoveChannels).parameters


def test_a_provider_that_is_no_list_is_refused(file: Path) -> None:
    with pytest.raises(ArgumentTypeError, match=r"a list is needed, \['CPUExecutionProvider'\]"):
        bench([file], providers="CPUExecutionProvider")


WRONG: dict[str, Callable[[fxprune.TracedModule], object]] = {
    "to_onnx": lambda traced: to_onnx(traced, "model.bin"),
    "to_program": lambda traced: to_program(traced, "model.onnx"),
    "to_torchscript": lambda traced: to_torchscript(traced, Path("model")),
    "compare": lambda traced: fxprune.compare(traced, "model.txt", inputs=X),
    "inspect": lambda traced: fxprune.export.inspect("model.pt"),
    "export on the command line": lambda traced: cli.export("torch.nn:Identity", Path("a.txt"), ["2x3"]),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_a_wrong_ending_of_a_file_name_is_one_error(
    call: Callable[[fxprune.TracedModule], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SuffixError, match=r"^'.*' was to be \w+.*; the name must end in .*, by which the format is"):
        call(traced_with_dead_rows())
    assert not list(tmp_path.iterdir())


def test_the_error_of_a_wrong_ending_is_what_each_function_raised_before() -> None:
    for kind in (ExportError, CompareError, ArgumentError, ValueError):
        assert issubclass(SuffixError, kind)
