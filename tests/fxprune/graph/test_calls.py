"""Inputs are given in one form to every function that takes some."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune import Call
from fxprune.errors import CompareError, InputError
from fxprune.export import Session, bench, to_onnx, to_program, to_torchscript
from fxprune.export.judging import Tolerance
from fxprune.graph.calls import as_call, as_calls, each_call

X, Y = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.full((3, 4), 2.0)
FORMS: dict[str, Any] = {
    "tuple": (X, Y), "dict": {"x": X, "y": Y}, "dict in another order": {"y": Y, "x": X}, "both": Call((X,), {"y": Y}),
}  # fmt: skip
every_form = pytest.mark.parametrize("form", FORMS)


class Adds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layer(x + y)


@pytest.fixture(scope="module")
def model() -> Adds:
    torch.manual_seed(0)
    return Adds().eval()


@pytest.fixture(scope="module")
def final(model: Adds) -> fxprune.TracedModule:
    return fxprune.finalize(fxprune.trace(model, (X, Y)))


@pytest.fixture(scope="module")
def file(final: fxprune.TracedModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_onnx(final, tmp_path_factory.mktemp("calls") / "model.onnx").path


@every_form
def test_trace_takes_every_form(model: Adds, form: str) -> None:
    traced = fxprune.trace(model, FORMS[form])
    wanted = model(X, Y)
    assert torch.equal(traced(X, Y), wanted)
    assert torch.equal(traced(y=Y, x=X), wanted)


def test_trace_takes_a_part_by_name_beside_a_tensor(model: Adds) -> None:
    for args, kwargs in ((X, {"y": Y}), ({"x": X}, {"y": Y}), ([X, Y], None), ((), {"y": Y, "x": X})):
        assert torch.equal(fxprune.trace(model, args, kwargs)(X, Y), model(X, Y))


@every_form
def test_compare_takes_every_form_and_lists_of_them(model: Adds, final: fxprune.TracedModule, form: str) -> None:
    inputs = FORMS[form]
    assert len(fxprune.compare(model, final, inputs=inputs).rows) == 1
    assert len(fxprune.compare(model, final, inputs=[inputs, inputs]).rows) == 2
    assert len(fxprune.compare(model, final, inputs=iter([inputs])).rows) == 1


@every_form
def test_files_run_and_are_measured_on_every_form(model: Adds, file: Path, form: str) -> None:
    (output,) = Session(file).run(FORMS[form]).values()
    assert torch.allclose(output, model(X, Y), atol=1e-6)
    assert bench([file], inputs=FORMS[form], rounds=1, warmup=0)[0].median > 0


@every_form
@pytest.mark.parametrize(("writer", "suffix"), [(to_onnx, "onnx"), (to_program, "pt2"), (to_torchscript, "pt")])
def test_exports_verify_on_inputs_in_every_form(
    final: fxprune.TracedModule, tmp_path: Path, writer: Callable[..., Any], suffix: str, form: str
) -> None:
    alone = writer(final, tmp_path / f"a.{suffix}").comparison.rows
    more = writer(final, tmp_path / f"b.{suffix}", inputs=[FORMS[form], FORMS[form]]).comparison.rows
    assert len(more) == len(alone) + 2


@pytest.mark.parametrize(("writer", "suffix"), [(to_onnx, "onnx"), (to_program, "pt2"), (to_torchscript, "pt")])
def test_exports_have_a_tolerance_and_may_be_left_unverified(
    final: fxprune.TracedModule,
    tmp_path: Path,
    writer: Callable[..., Any],
    suffix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / f"model.{suffix}"
    report = writer(final, path, verify=False)
    assert report.comparison is None
    assert report.size == path.stat().st_size
    path.unlink()
    monkeypatch.setattr(Tolerance, "limit", lambda self, dtype, scale: (self.atol or 0.0) - 1.0)
    with pytest.raises(fxprune.errors.ExportError, match="computes something else"):
        writer(final, path, inputs=(X * 1e3, Y), rtol=0, atol=0.5)
    assert not path.exists()
    assert writer(final, path, rtol=1e-3, atol=1.5).comparison.ok


@every_form
def test_calibration_takes_every_form(final: fxprune.TracedModule, tmp_path: Path, form: str) -> None:
    batches: Iterator[Any] = (inputs for inputs in [FORMS[form]] * 2)
    report = to_onnx(final, tmp_path / "int8.onnx", precision="int8", calibration=batches, atol=1.0)
    assert report.comparison is not None
    assert len({row.call for row in report.comparison.rows}) > 2


@every_form
def test_loaders_of_scores_give_every_form(model: Adds, form: str) -> None:
    traced = fxprune.trace(model, (X, Y))
    target = torch.zeros(3, 2)
    wanted = fxprune.importance.scores(traced, "*.weight", "taylor", loader=[((X, Y), target)], loss=nn.MSELoss())
    found = fxprune.importance.scores(traced, "*.weight", "taylor", loader=[(FORMS[form], target)], loss=nn.MSELoss())
    assert torch.equal(found["layer.weight"], wanted["layer.weight"])


def test_a_loader_without_labels_is_a_list_of_calls() -> None:
    alone = as_calls(DataLoader(TensorDataset(X), 1))
    assert [call.args[0].shape for call in alone] == [(1, 4)] * 3
    with pytest.raises(InputError, match=r"hold a list, of a DataLoader.*inputs for inputs, labels in loader"):
        as_calls(DataLoader(TensorDataset(X, Y), 1))


def test_calls_are_asked_for_one_by_one() -> None:
    asked: list[int] = []

    def batches() -> Iterator[Any]:
        for i in range(3):
            asked.append(i)
            yield [X] if i else (X, Y)

    calls = each_call(batches())
    assert next(calls) == Call((X, Y), {})
    assert asked == [0]
    assert [call.args for call in calls] == [(X,), (X,)]
    assert [*each_call({"x": X})] == [Call((), {"x": X})]
    assert len([*each_call([X, X])]) == 2
    with pytest.raises(InputError, match=r"hold a list, of a DataLoader.*inputs for inputs, labels in loader"):
        next(each_call(DataLoader(TensorDataset(X, Y), 1)))


def test_what_is_no_form_is_named_with_the_forms() -> None:
    for wrong, says in ((3, "a int"), (np.ones(2), "from_numpy"), ("x", "a str"), (nn.Sequential(), "a Sequential")):
        with pytest.raises(CompareError, match=says) as caught:
            as_calls(wrong, error=CompareError)
        assert "a tuple of positional arguments, a dict of keyword arguments" in str(caught.value)
    with pytest.raises(InputError, match="x is given twice"):
        as_call({"x": X}, {"x": X})
