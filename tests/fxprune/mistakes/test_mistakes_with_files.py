"""Mistakes of those who export, compare, save and load for the first time: see `test_mistakes`."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import fxprune
from fxprune.errors import (
    ArgumentError,
    ArgumentTypeError,
    ArtifactError,
    CompareError,
    InputError,
    SuffixError,
    WriteBackError,
)
from tests.beginners import IMAGES, LABELS, LOADER, Case, Tokens, refused, small, smaller, unchanged

FILES: dict[str, Case] = {
    "the order of torch.onnx": (
        lambda f: fxprune.export.to_onnx(f, IMAGES, "m.onnx"), ArgumentTypeError, "3 arguments by position: too many",
        r"It is called to_onnx\(final, path, \*, opset=None"),
    "an option of torch.onnx": (
        lambda f: fxprune.export.to_onnx(f, "m.onnx", opset_version=18), ArgumentTypeError, "'opset_version'",
        r"Did you mean opset\?"),
    "an option of torch.load": (
        lambda f: fxprune.load("m.fxp", map_location="cpu"), ArgumentTypeError, "'map_location'",
        r"It is called load\(path, model=None, \*, spread=None\)"),
    "no model to write to": (
        lambda f: fxprune.write_back(f), ArgumentTypeError, "missing a required .* 'model'", r"\(final, model\)"),
    "a session's provider that is no list": (
        lambda f: fxprune.export.Session("m.onnx", "CPUExecutionProvider"), ArgumentTypeError, "providers='CPUE",
        r"\['CPUExecutionProvider'\]"),
    "a session of a program": (
        lambda f: fxprune.export.Session("m.pt2"), SuffixError, "'m.pt2' was to be run by onnxruntime", "to_onnx"),
    "a session's threads as text": (
        lambda f: fxprune.export.Session("m.onnx", threads="2"), ArgumentTypeError, "threads='2'", "an integer"),
    "a negative tolerance": (
        lambda f: fxprune.export.to_onnx(f, "m.onnx", rtol=-1), ArgumentError, "rtol=-1", "0 or more"),
    "no number for a tolerance": (
        lambda f: fxprune.compare(f, f, inputs=IMAGES, atol=float("nan")), ArgumentError, "atol=nan", "0 or more"),
    "threads as text": (
        lambda f: fxprune.export.bench(["m.onnx"], threads="2"), ArgumentTypeError, "threads='2'", "an integer"),
    "half a round": (
        lambda f: fxprune.export.bench(["m.onnx"], rounds=1.5), ArgumentTypeError, "rounds=1.5", "an integer"),
    "a program to measure": (
        lambda f: fxprune.export.bench(["m.pt2"]), SuffixError, "'m.pt2' was to be measured", "export.to_onnx"),
    "comparison with weights": (
        lambda f: fxprune.compare(f, f.state_dict(), inputs=IMAGES), CompareError, "a OrderedDict", "load_state_dict"),
    "a call by other names": (
        lambda f: f(x=IMAGES), InputError, "Missing: input. Not captured: x", "by their captured names"),
    "a call with labels by name": (
        lambda f: f(input=IMAGES, labels=LABELS), InputError, "Not captured: labels", "Labels are no input"),
    "save as ONNX": (
        lambda f: fxprune.save(f, "m.onnx"), SuffixError, "'m.onnx' was to be written by save", "export.to_onnx"),
    "save as a program": (
        lambda f: fxprune.save(f, "m.pt2"), SuffixError, "the format that .pt2 says", "export.to_program"),
    "an optimizer that is there already": (
        lambda f: fxprune.optimizer_after(f, torch.optim.SGD(f.parameters(), 0.1)), ArgumentError,
        "holds parameters of the finalized module", "use it as it is"),
    "calibration with labels": (
        lambda f: fxprune.export.to_onnx(f, "m.onnx", precision="int8", calibration=LOADER), CompareError,
        "a list, of a DataLoader among the calibration batches", "inputs for inputs, labels in loader"),
    "calibration by pairs": (
        lambda f: fxprune.export.to_onnx(f, "m.onnx", precision="int8", calibration=[(IMAGES, LABELS)]), InputError,
        "called with 2 positional", "Labels are no input"),
    "a number of calibration batches": (
        lambda f: fxprune.export.to_onnx(f, "m.onnx", precision="int8", calibration=8), CompareError, "a int", "Give"),
    "a path before the module": (
        lambda f: fxprune.export.to_onnx("m.onnx", f), ArgumentTypeError, "given a str", "module comes first"),
    "an operator set as text": (
        lambda f: fxprune.export.to_onnx(f, "m.onnx", opset="18"), ArgumentTypeError, "opset='18'", "a number"),
    "a provider that is no list": (
        lambda f: fxprune.export.to_onnx(f, "m.onnx", providers="CPUExecutionProvider"), ArgumentTypeError,
        "providers='CPUEx", r"\['CPUExecutionProvider'\]"),
    "a name that is no list": (
        lambda f: fxprune.export.to_onnx(f, "m.onnx", input_names="image"), ArgumentTypeError, "'image'", "a list"),
    "the shapes of trace for those of a file": (
        lambda f: fxprune.export.to_onnx(f, "m.onnx", dynamic_shapes="batch"), ArgumentError, "'batch'", "is traced"),
    "no path": (lambda f: fxprune.export.to_program(f, None), ArgumentTypeError, "got NoneType", "the path of a file"),
    "a tolerance as text": (
        lambda f: fxprune.compare(f, f, inputs=IMAGES, rtol="1e-3"), ArgumentTypeError, "rtol='1e-3'", "a number"),
    "names that are one text": (
        lambda f: fxprune.compare(f, f, inputs=IMAGES, names="ab"), ArgumentTypeError, "names='ab'", "a list"),
    "a shape for an input": (
        lambda f: fxprune.compare(f, f, inputs=(4, 3, 8, 8)), InputError, "4 positional", r"captured with \(input\)"),
    "comparison with labels": (
        lambda f: fxprune.compare(f, f, inputs=(IMAGES, LABELS)), InputError, "2 positional", "Labels are no input"),
    "comparison with a labelled batch": (
        lambda f: fxprune.compare(f, f, inputs=[IMAGES, LABELS]), CompareError, "float32, int64", "inputs alone"),
    "comparison with labelled batches": (
        lambda f: fxprune.compare(f, f, inputs=list(LOADER)), CompareError, "hold a list", "inputs alone"),
    "comparison with a loader": (
        lambda f: fxprune.compare(f, f, inputs=LOADER), CompareError, "hold a list, of a DataLoader", "inputs alone"),
    "comparison with a dataset": (
        lambda f: fxprune.compare(f, f, inputs=LOADER.dataset), CompareError, "hold a TensorDataset", "inputs alone"),
    "measuring on several calls": (
        lambda f: fxprune.export.bench(["m.onnx"], inputs=[IMAGES, IMAGES]), ArgumentError, "2 calls were",
        "one is measured"),
    "verify as text": (
        lambda f: fxprune.export.to_program(f, "m.pt2", verify="no"), ArgumentTypeError, "verify='no'", "True or"),
    "comparison of eager models with labels": (
        lambda f: fxprune.compare(small(), f, inputs=(IMAGES, LABELS)), CompareError, "takes 2 pos", "Labels are no"),
    "comparison with an array": (
        lambda f: fxprune.compare(f, f, inputs=IMAGES.numpy()), CompareError, "hold a ndarray", "torch.from_numpy"),
    "inputs without their name": (
        lambda f: fxprune.compare(f, f, (IMAGES,)), ArgumentTypeError, "given no inputs", r"inputs=\(x,\)"),
    "inputs before the models": (
        lambda f: fxprune.compare(IMAGES, f, inputs=f), CompareError, "hold a TracedModule", "come before"),
    "inputs among the models": (
        lambda f: fxprune.compare(f, IMAGES, inputs=IMAGES), CompareError, "a Tensor was given", "inputs=x"),
    "comparison with a class": (
        lambda f: fxprune.compare(f, Tokens, inputs=IMAGES), CompareError, "a type was given", "instance of Tokens"),
    "comparison with a file of weights": (
        lambda f: fxprune.compare(f, "weights.pth", inputs=IMAGES), CompareError, "weights.pth", "load_state_dict"),
    "one file to measure": (
        lambda f: fxprune.export.bench("m.onnx"), ArgumentTypeError, "a list of the paths", r"\['dense.onnx'"),
    "a module to measure": (lambda f: fxprune.export.bench([f]), ArgumentTypeError, "a list of the paths", "to_onnx"),
    "a module to inspect": (lambda f: fxprune.export.inspect(f), ArgumentTypeError, "got TracedModule", "the path"),
    "a call with labels": (lambda f: f(IMAGES, LABELS), InputError, "2 positional", "Labels are no input"),
    "a call with an array": (lambda f: f(IMAGES.numpy()), InputError, "is a ndarray", "torch.from_numpy"),
    "a call with a batch": (
        lambda f: f([IMAGES, LABELS]), InputError, "`input` is a list of 2", r"traced\(inputs\), labels aside"),
    "a call with a mapping": (
        lambda f: f({"input": IMAGES}), InputError, "`input` is a dict of 1", r"traced\(\*\*batch\)"),
    "save with swapped arguments": (
        lambda f: fxprune.save("m.fxp", f), ArgumentTypeError, "got str", "module comes first"),
    "save without a path": (lambda f: fxprune.save(f, None), ArgumentTypeError, "got NoneType", "path of a file"),
    "load with swapped arguments": (
        lambda f: fxprune.load(small(), "m.fxp"), ArgumentTypeError, "got Sequential", "path comes first"),
    "load into a class": (
        lambda f: fxprune.load("m.fxp", Tokens), ArgumentTypeError, "got type", "instance of the class"),
    "write_back with swapped arguments": (
        lambda f: fxprune.write_back(small(), f), ArgumentTypeError, "Sequential and a TracedModule", "swapped"),
    "write_back into a class": (
        lambda f: fxprune.write_back(f, Tokens), ArgumentTypeError, "a type", "instance of the class"),
    "write_back into another model": (
        lambda f: fxprune.write_back(f, Tokens()), WriteBackError, "Tokens has no 0.weight", "another model"),
    "write_back into weights": (
        lambda f: fxprune.write_back(f, f.state_dict()), ArgumentTypeError, "OrderedDict", "load these into it"),
    "optimizer_after with a scheduler": (
        lambda f: fxprune.optimizer_after(f, _scheduler()), ArgumentTypeError, "and StepLR", "the scheduler's"),
    "optimizer_after with swapped arguments": (
        lambda f: fxprune.optimizer_after(torch.optim.SGD(f.parameters(), 0.1), f), ArgumentTypeError,
        "got SGD and TracedModule", "swapped"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES.values(), ids=FILES)
def test_what_export_comparison_and_files_cannot_take_is_named_and_nothing_is_written(
    finalized: fxprune.TracedModule, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    final = copy.deepcopy(finalized)
    with unchanged(final):
        refused(case, final)
    assert not list(tmp_path.iterdir())


def test_a_file_of_a_module_with_masks_says_that_nothing_was_taken_out(
    traced: fxprune.TracedModule, tmp_path: Path
) -> None:
    fxprune.prune.channels(traced, 0.5)
    report = fxprune.export.to_onnx(traced, tmp_path / "masked.onnx", verify=False)
    assert re.search(r"note: \d+ parameters of the module have masks.*fxprune.finalize takes it out", str(report))
    final = fxprune.finalize(traced)
    assert not fxprune.export.to_onnx(final, tmp_path / "small.onnx", verify=False).notes


def test_an_onnx_file_says_that_labels_are_no_input(traced: fxprune.TracedModule, tmp_path: Path) -> None:
    fxprune.export.to_onnx(traced.eval(), tmp_path / "m.onnx")
    with pytest.raises(CompareError, match="2 inputs were given where 1 are taken .labels are no input.*'input'"):
        fxprune.compare(tmp_path / "m.onnx", tmp_path / "m.onnx", inputs=(IMAGES, LABELS))
    with pytest.raises(CompareError, match="keyword inputs are a Tensor; .* labels are no input"):
        fxprune.export.Session(tmp_path / "m.onnx").run(IMAGES, LABELS)


def test_a_comparison_that_fails_is_false_as_an_assertion_takes_it(traced: fxprune.TracedModule) -> None:
    other = copy.deepcopy(traced)
    with torch.no_grad():
        other.get_parameter("5.bias").add_(1)
    assert fxprune.compare(traced, traced, inputs=IMAGES)
    assert not fxprune.compare(traced, other, inputs=IMAGES)


def test_a_file_of_another_model_is_said_to_be_one(
    finalized: fxprune.TracedModule, traced: fxprune.TracedModule, tmp_path: Path
) -> None:
    fxprune.save(finalized, tmp_path / "m.fxp", programs=False)
    model = Tokens()
    with unchanged(model), pytest.raises(ArtifactError, match="another model: Tokens has no 0.weight, 0.bias, "):
        fxprune.load(tmp_path / "m.fxp", model)
    final = smaller(copy.deepcopy(traced))
    fxprune.save(final, tmp_path / "small.fxp", programs=False)
    with unchanged(final), pytest.raises(ArtifactError, match="do not fit the model.*Give the dense model"):
        fxprune.load(tmp_path / "small.fxp", final)


def _write_onnx(path: Path) -> None:
    fxprune.export.to_onnx(fxprune.trace(nn.Linear(4, 2), (torch.randn(3, 4),)).eval(), path, verify=False)


def _write_script(path: Path) -> None:
    with pytest.warns(DeprecationWarning, match=r"torch\.jit\."):
        torch.jit.save(torch.jit.script(nn.Linear(4, 2)), path)


STRANGERS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "m.onnx": (_write_onnx, "is an ONNX file", "onnxruntime or fxprune.compare"),
    "m.pt": (_write_script, "is TorchScript", "torch.jit.load"),
    "m.pth": (lambda path: torch.save(small().state_dict(), path), "is a file of torch.save", "load_state_dict"),
    "m.safetensors": (
        lambda path: safetensors.torch.save_file(small().state_dict(), path), "of safetensors", "load_state_dict"),
}  # fmt: skip


def test_load_says_of_an_empty_file_that_it_is_empty(tmp_path: Path) -> None:
    (tmp_path / "m.fxp").touch()
    with pytest.raises(ArtifactError, match=r"is empty\. .* must be written again"):
        fxprune.load(tmp_path / "m.fxp")


@pytest.mark.parametrize("name", STRANGERS)
@pytest.mark.parametrize("is_renamed", [False, True], ids=["named", "renamed"])
def test_load_names_the_format_of_a_file_that_is_none_of_its_own(tmp_path: Path, name: str, is_renamed: bool) -> None:
    write, kind, cure = STRANGERS[name]
    write(tmp_path / name)
    path = (tmp_path / name).rename(tmp_path / "m.fxp") if is_renamed else tmp_path / name
    model = small()
    for into in (None, model):
        with unchanged(model), pytest.raises(ArtifactError, match=f"'{path}' {kind}|{kind}") as caught:
            fxprune.load(path, into)
        assert re.search(cure, str(caught.value))
        assert "truncated" not in str(caught.value)


def _scheduler() -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(torch.optim.SGD([nn.Parameter(torch.ones(2))]), 1)


@pytest.mark.parametrize(
    ("wrong", "cure"),
    [
        (lambda: small().parameters(), "the one that holds these parameters.*clip_grad_norm_"),
        (small, "the one that holds these parameters"),
        (lambda: torch.optim.SGD, "an instance of SGD"),
        (_scheduler, "the scheduler's optimizer"),
        (lambda: torch.amp.GradScaler("cpu"), "the optimizer that it scales for"),
    ],
    ids=["parameters", "model", "class", "scheduler", "scaler"],
)
def test_what_is_no_optimizer_leads_to_the_one_that_is_meant(wrong: Callable[[], Any], cure: str) -> None:
    with pytest.raises(ArgumentTypeError, match=f"with step hooks, got .*{cure}"):
        fxprune.clip_gradients(wrong(), max_norm=1.0)


def test_a_number_as_text_is_no_limit_for_gradients() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))])
    with pytest.raises(ArgumentTypeError, match="max_norm must be a number .*'1.0' of type str"):
        fxprune.clip_gradients(optimizer, max_norm="1.0")
    assert not optimizer._optimizer_step_pre_hooks
