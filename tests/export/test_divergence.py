"""Where two computations part: float64 errors, the first node that differs, and the script that shows it."""

from __future__ import annotations

import copy
import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.onnx import ONNXProgram

import fxprune
from fxprune.errors import CompareError, ExportError
from fxprune.export import Call, compare, onnx_files, to_onnx, to_program, to_torchscript
from fxprune.export.node_values import GraphValues
from fxprune.graph.traced import TracedModule
from tests import sharded_networks
from tests.chains import lengthen
from tests.networks import NETWORKS

# the node that a wrong weight shows at: in the ONNX file batch norm is part of the convolution
WRONG = {
    "mlp": ("0.weight", "linear", "batch_norm"),
    "residual": ("inner.weight", "conv2d_1", "batch_norm_1"),
    "lstm": ("out.weight", "linear", "linear"),
    "encoder": ("layer.linear2.weight", "linear_3", "linear_3"),
    "embedding": ("words.weight", "embedding", "embedding"),
}


BATCH = 8
FREE = ("mlp", "embedding")  # the networks captured for any batch


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[nn.Module, fxprune.TracedModule, Path, Path]]:
    """Of each network: the model, its capture, and a file of each of two formats."""
    found = {}
    for key, (build, sample, _) in NETWORKS.items():
        torch.manual_seed(0)
        model = build().eval()
        # a fixed batch is exported in a third of the time
        shapes = "batch" if key in FREE else None
        traced = fxprune.trace(model, (sample(BATCH),), modes=("eval",), dynamic_shapes=shapes)
        folder = tmp_path_factory.mktemp(key)
        found[key] = model, traced, to_onnx(traced, folder / "m.onnx").path, to_program(traced, folder / "m.pt2").path
    return found


def edit(path: Path, name: str) -> None:
    """Make one weight of an ONNX file wrong."""
    model = onnx.load(path)
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    values = numpy_helper.to_array(tensor).copy()
    values.reshape(-1)[1] += 0.3
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    onnx.save(model, path)


def largest(printed: str) -> float:
    """The largest difference that a script prints."""
    return float(printed.split()[2].rstrip(","))


@pytest.mark.parametrize("key", NETWORKS)
def test_a_wrong_weight_is_found_at_its_node(
    files: Any, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, traced, right, program = files[key]
    name, node, node_in_onnx = WRONG[key]
    path = shutil.copy(right, tmp_path / "wrong.onnx")
    edit(path, name)
    changed = copy.deepcopy(traced)
    with torch.no_grad():
        changed.get_parameter(name).view(-1)[1] += 0.3
    x = NETWORKS[key][1](32 if key in FREE else BATCH)
    if key == "embedding":
        x[0, 0] = 0
    for candidate, expected in ((path, node_in_onnx), (changed, node)):
        for reference in (model, traced, program):
            report = compare(reference, candidate, inputs=[x[:1].clone(), x] if key == "embedding" else x)
            first = report.first_divergence
            assert first is not None
            assert (first.node, first.call) == (expected, 0)
            assert first.reference != first.found
            assert str(first) in report.table()
            again = json.loads(json.dumps(report.to_dict(), allow_nan=False))["first_divergence"]
            assert (again["node"], again["shape"]) == (expected, list(first.shape))
        assert compare(candidate, traced, inputs=x).first_divergence is not None
    module = traced.graphs["eval"].find_nodes
    assert first.module == name.rpartition(".")[0] or not module(op="get_attr", target=name)
    report.reproduce(tmp_path / "alone.py")
    capsys.readouterr()
    runpy.run_path(str(tmp_path / "alone.py"))
    assert largest(capsys.readouterr().out) == pytest.approx(abs(first.reference - first.found), rel=1e-2)


def test_the_script_for_an_onnx_file_runs_its_piece(
    files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, traced, *_ = files["residual"]
    path = tmp_path / "wrong.onnx"
    to_onnx(traced, path, sparse=True)
    edit(path, "inner.weight")
    report = compare(traced, path, inputs=NETWORKS["residual"][1](BATCH))
    first = report.first_divergence
    assert first is not None
    assert (first.node, first.operator, first.found_operator) == ("batch_norm_1", "aten.batch_norm.default", "Conv")
    assert first.module == "inner_norm"
    report.reproduce(tmp_path / "alone.py")
    piece = onnx.load(tmp_path / "alone.candidate.onnx").graph
    assert [node.op_type for node in piece.node] == ["Conv"]
    monkeypatch.chdir("/")
    capsys.readouterr()
    runpy.run_path(str(tmp_path / "alone.py"))
    assert largest(capsys.readouterr().out) == pytest.approx(abs(first.reference - first.found), rel=1e-2)


def test_verification_names_the_node(files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = onnx_files.save

    def corrupt(program: ONNXProgram, path: Path) -> None:
        save(program, path)
        edit(path, "inner.weight")

    monkeypatch.setattr("fxprune.export.onnx.save", corrupt)
    with pytest.raises(
        ExportError, match=r"node `batch_norm_1` \(aten\.batch_norm\.default in inner_norm; there Conv\)"
    ):
        to_onnx(files["residual"][1], tmp_path / "m.onnx")


def test_nothing_to_show(files: Any, tmp_path: Path) -> None:
    model, traced, path, _ = files["mlp"]
    x = NETWORKS["mlp"][1](4)
    report = compare(model, traced, path, inputs=x)
    assert report.ok
    assert report.first_divergence is None
    with pytest.raises(CompareError, match="no node is known to differ"):
        report.reproduce(tmp_path / "a.py")
    script = to_torchscript(traced, tmp_path / "m.pt").path
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong[0].bias += 1
    report = compare(wrong, script, inputs=x)  # TorchScript keeps no names
    assert (report.ok, report.first_divergence) == (False, None)
    assert not list(tmp_path.glob("*.py"))


class Increment(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def test_a_piece_may_be_a_long_chain() -> None:
    traced = fxprune.trace(Increment(), (torch.zeros(2),), modes=("eval",))
    last = lengthen(traced.graphs["eval"], torch.ops.aten.add.Tensor, 1200)
    values = GraphValues(traced, Call((torch.zeros(2),), {}))
    assert values.values[last].tolist() == [1200.0, 1200.0]
    piece = values.piece(last, {list(values.computed)[99]: torch.full((2,), 7.0)})
    assert [tensor.tolist() for tensor in piece.tensors.values()] == [[7.0, 7.0]]
    found: dict[str, Any] = {"torch": torch}
    exec(piece.code, found)  # the code that a script holds
    assert found["SIDE"](*piece.tensors.values()).tolist() == [1107.0, 1107.0]


# ---- float64


@pytest.mark.parametrize("key", NETWORKS)
def test_errors_against_float64(files: Any, key: str) -> None:
    model, traced, path, program = files[key]
    x = NETWORKS[key][1](BATCH)
    wide = copy.deepcopy(model).double()(x.double() if x.is_floating_point() else x).detach()
    for reference in (model, traced):
        report = compare(reference, path, program, inputs=x)
        assert report.ok, report.table()
        assert not report.no_float64
        got = reference(x).detach().double()
        own = float((got - wide).abs().max() / wide.abs().max())
        for row in report.rows:
            assert row.reference_error == pytest.approx(own, rel=1e-3)
            assert row.error is not None
            assert 0 < row.error < 1e-5
        assert "reference's" in report.table()


class Upcasts(nn.Module):
    """Names float32 in its code, as many transformers do around softmax; carries hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), parametrizations.weight_norm(nn.Linear(16, 4))
        prune.l1_unstructured(self.a, "weight", 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x).to(torch.float32).softmax(-1, dtype=torch.float32)
        return self.b(y + torch.zeros(16) + torch.arange(16, dtype=torch.float32) / 3)


def test_a_float64_copy_is_one_throughout() -> None:
    model = Upcasts().eval()
    x = torch.randn(4, 16)
    model(x)  # the hook's result is now an attribute that cannot be copied
    traced = fxprune.trace(model, (x,), modes=("eval",))
    eager, captured = compare(model, traced, inputs=x), compare(traced, model, inputs=x)
    assert eager.rows[0].reference_error == captured.rows[0].reference_error
    w = model.double()
    y = torch.nn.functional.linear(x.double(), w.a.weight_orig * w.a.weight_mask, w.a.bias).softmax(-1)
    exact = w.b(y + torch.arange(16, dtype=torch.float64) / 3).detach()
    model.float()
    own = float((model(x).detach().double() - exact).abs().max() / exact.abs().max())
    assert eager.rows[0].reference_error == pytest.approx(own, rel=1e-3)
    assert torch.get_default_dtype() == torch.float32


class Cancels(nn.Module):
    """Loses all digits but a few: (x + big) - big."""

    def __init__(self, big: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.big = big

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.scale + self.big) - self.big


def test_a_difference_within_the_references_own_rounding_agrees() -> None:
    x = torch.linspace(1, 2, 50)
    report = compare(Cancels(1e5), Cancels(0.0), inputs=x)
    assert report.rows[0].max_rel > 1e-4
    assert report.ok
    assert "by the rounding of the reference" in report.table()
    assert not compare(Cancels(0.0), Cancels(1e5), inputs=x).ok
    assert not compare(Cancels(1e5), Cancels(0.0), inputs=x, rtol=1e-4).ok


def test_a_copy_that_cannot_be_made_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("no copies")

    layer = Stubborn(2, 2)
    report = compare(layer, layer, inputs=torch.ones(1, 2))
    assert report.ok
    assert "there is no float64 copy of the reference: RuntimeError: no copies" in report.table()
    assert report.rows[0].error is None


class Refuses(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float64:
            raise TypeError("float32 alone")
        return super().forward(x)


def test_a_copy_that_cannot_run_is_said_and_leaves_the_default_dtype() -> None:
    layer = Refuses(2, 2)
    report = compare(layer, layer, inputs=[torch.ones(1, 2), torch.zeros(1, 2)])
    assert report.ok
    assert "Refuses cannot run these inputs: TypeError: float32 alone" in report.no_float64
    assert torch.get_default_dtype() == torch.float32


def test_modules_that_are_spread_over_processes_show_the_node_that_plain_ones_show(alone: None) -> None:
    def first(spread: Callable[[TracedModule], TracedModule]) -> dict[str, Any]:
        dense, masked = spread(sharded_networks.traced()), spread(sharded_networks.traced())
        fxprune.prune.l1_unstructured(masked, "inner.weight", 0.5)
        report = compare(dense.eval(), masked.eval(), inputs=sharded_networks.inputs())
        assert report.first_divergence is not None
        return report.first_divergence.to_dict() | {"candidate": ""}

    found = first(sharded_networks.by_fsdp)
    assert found["module"] == "inner"
    assert found == first(sharded_networks.plain)
