"""`to_onnx`: what stands in the file, that it was verified, and that nothing is left of what fails."""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.export import Dim
from torch.nn.utils import parametrizations, prune
from torch.onnx import ONNXProgram

import fxprune
from fxprune.errors import ArgumentError, ArgumentTypeError, ExportError
from fxprune.export import Call, Session, compare, onnx_files, to_onnx
from fxprune.export import onnx as onnx_export


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).relu_().mean((2, 3)))


@dataclass
class Outputs:
    logits: torch.Tensor
    rest: dict[str, Any]


class Everything(nn.Module):
    """Reparametrized layers, keyword module names, and every kind of output."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"class": nn.Linear(4, 4), "def": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
        prune.l1_unstructured(self.layers["class"], "weight", 0.5)
        parametrizations.weight_norm(self.layers["def"])
        parametrizations.spectral_norm(self.layers["other"])

    def forward(self, relu: torch.Tensor, unused: torch.Tensor, times: int = 1, cfg: Any = None) -> Outputs:
        y = relu
        for layer in self.layers.values():
            y = layer(y)
        y = y.relu() * times
        rest = {"relu": y, "none": None, "size": y.shape[0], "times": times, "input": relu}
        rest |= {"bias": self.layers["class"].bias, "nested": [cfg["z"] + 1, y.argmax(-1)]}
        return Outputs(y, rest)


@pytest.fixture(scope="module")
def network() -> fxprune.TracedModule:
    torch.manual_seed(0)
    model = Network()
    model.norm.running_mean.normal_()
    return fxprune.trace(model, torch.randn(3, 2, 6, 6))


@pytest.fixture(scope="module")
def small() -> fxprune.TracedModule:
    torch.manual_seed(0)
    return fxprune.trace(nn.Sequential(nn.Linear(4, 300), nn.Tanh()), torch.randn(2, 4), modes=("eval",))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_text("old")
    return path


def assert_untouched(old: Path) -> None:
    assert old.read_text() == "old"
    assert list(old.parent.iterdir()) == [old]


# ---- what is written


def test_a_network_in_train_mode_is_exported_verified_and_left_alone(
    network: fxprune.TracedModule, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    random = torch.get_rng_state()
    report = to_onnx(network, tmp_path / "network.onnx")
    assert capfd.readouterr() == ("", "")
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())

    assert list(tmp_path.iterdir()) == [report.path]
    assert report.size == report.path.stat().st_size
    assert (report.opset, report.inputs, report.outputs) == (20, ("x",), ("output",))
    assert report.comparison is not None
    assert [(row.shape, row.ok) for row in report.comparison.rows] == [((3, 3), True), ((4, 3), True), ((1, 3), True)]
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["comparison"]["ok"] is True

    model = onnx.load(report.path)
    names = {tensor.name: tensor for tensor in model.graph.initializer}
    assert {"conv.weight", "head.weight", "head.bias"} <= names.keys()
    assert np.array_equal(numpy_helper.to_array(names["head.weight"]), network.head.weight.detach().numpy())
    assert not [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in shape] == ["batch", 2, 6, 6]
    assert compare(network, report.path, inputs=torch.randn(7, 2, 6, 6)).ok


def test_reparametrized_layers_and_every_kind_of_output(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, z = Everything().eval(), torch.randn(2, 4), torch.randn(2, 3)
    kwargs = {"cfg": {"z": z}, "times": 3, "unused": torch.ones(2, 5)}
    traced = fxprune.trace(model, (x,), kwargs, modes=("eval",))
    report = to_onnx(traced, tmp_path / "everything.onnx")
    assert report.inputs == ("relu", "cfg_z", "unused")
    assert report.outputs == (
        "logits", "rest_relu", "rest_size", "rest_times", "rest_input", "rest_bias", "rest_nested_0", "rest_nested_1"
    )  # fmt: skip
    file = onnx.load(report.path)
    weights = {tensor.name: tuple(tensor.dims) for tensor in file.graph.initializer}
    for name in ("class", "def", "other"):  # folded, under the names of the model without reparametrizations
        assert weights[f"layers.{name}.weight"] == (4, 4)
    assert not [name for name in weights if "orig" in name or "parametrizations" in name]
    again = Call((torch.randn(5, 4),), {"unused": torch.ones(5, 5), "times": 3, "cfg": {"z": torch.randn(5, 3)}})
    result = compare(model, traced, report.path, inputs=again)
    assert result.ok, result.table()
    assert len(result.rows) == 16


def test_equal_exports_are_equal_files(small: fxprune.TracedModule, tmp_path: Path) -> None:
    one, two = (to_onnx(small, tmp_path / name).path for name in ("a.onnx", "b.onnx"))
    assert one.read_bytes() == two.read_bytes()


def test_names_opset_and_verification_inputs_are_the_callers(small: fxprune.TracedModule, tmp_path: Path) -> None:
    more = [(torch.randn(9, 4),), {"input": torch.randn(1, 4)}]
    report = to_onnx(small, tmp_path / "a.onnx", opset=18, input_names=["linear"], output_names=["tanh"], inputs=more)
    assert (report.opset, report.inputs, report.outputs) == (18, ("linear",), ("tanh",))
    assert report.comparison is not None
    assert [row.shape[0] for row in report.comparison.rows] == [2, 3, 1, 9, 1]
    opsets = {entry.domain: entry.version for entry in onnx.load(report.path).opset_import}
    assert opsets[""] == 18


def test_an_inner_value_gives_way_to_a_name(network: fxprune.TracedModule, tmp_path: Path) -> None:
    report = to_onnx(network, tmp_path / "a.onnx", input_names=["mean"], output_names=["relu_"])
    onnx.checker.check_model(report.path, full_check=True)
    assert list(Session(report.path).inputs) == ["mean"]
    assert Session(report.path).outputs == ["relu_"]


class Sum(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a[:, : b.shape[1]] + b


def test_every_free_axis_is_tried_at_another_size(tmp_path: Path) -> None:
    free = {0: Dim.AUTO, 1: Dim("length", min=3, max=6)}
    traced = fxprune.trace(Sum(), (torch.ones(2, 5), torch.ones(2, 5)), dynamic_shapes=(free, free), modes=("eval",))
    report = to_onnx(traced, tmp_path / "a.onnx")
    assert report.comparison is not None
    assert [row.shape for row in report.comparison.rows] == [(2, 5), (3, 6), (1, 5)]
    fixed = to_onnx(traced, tmp_path / "b.onnx", dynamic_shapes=None)
    assert fixed.comparison is not None
    assert [row.shape for row in fixed.comparison.rows] == [(2, 5)]
    assert Session(fixed.path).inputs["a"] == "tensor(float) [2, 5]"


class Halves(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (-1, 2)).sum(2)


def test_sizes_that_are_multiples_are_tried_at_other_multiples(tmp_path: Path) -> None:
    axes = ({0: Dim("batch"), 1: 2 * Dim("half")},)
    traced = fxprune.trace(Halves(), (torch.ones(2, 6),), dynamic_shapes=axes, modes=("eval",))
    report = to_onnx(traced, tmp_path / "a.onnx")
    assert report.comparison is not None
    assert [row.shape for row in report.comparison.rows] == [(2, 3), (3, 4), (1, 3)]
    assert compare(traced, report.path, inputs=torch.randn(4, 10)).ok


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table(torch.arange(x.shape[1]))


def test_sizes_that_the_model_cannot_run_are_not_tried(tmp_path: Path) -> None:
    axes = ({0: Dim.AUTO, 1: Dim.AUTO},)  # torch.export does not see that the table ends at five
    traced = fxprune.trace(Positions(), (torch.ones(2, 5, 2),), dynamic_shapes=axes, modes=("eval",))
    report = to_onnx(traced, tmp_path / "a.onnx")
    assert report.comparison is not None
    assert [row.shape for row in report.comparison.rows] == [(2, 5, 2), (1, 5, 2)]
    (note,) = report.notes
    assert note.startswith("not verified at the sizes {0[0]: 3, 0[1]: 6} (input[axis]), which the source cannot run: ")
    assert "IndexError" in note


def test_weights_beside_the_file(small: fxprune.TracedModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_files, "SINGLE_FILE_BYTES", 0)
    bystander = tmp_path / "model-00000000.onnx.data"
    bystander.write_text("not of this file")
    first = to_onnx(small, tmp_path / "model.onnx")
    (data,) = set(tmp_path.iterdir()) - {first.path, bystander}
    assert data.name.startswith("model-")
    assert first.size == first.path.stat().st_size + data.stat().st_size
    second = to_onnx(small, tmp_path / "model.onnx")  # takes the place of the first, and its data go
    (other,) = set(tmp_path.iterdir()) - {second.path, bystander}
    assert other != data
    assert compare(small, second.path, inputs=torch.randn(3, 4)).ok


def test_what_lies_beside_a_file_that_is_not_onnx_stays(small: fxprune.TracedModule, old: Path) -> None:
    bystander = old.with_name("model-00000000.onnx.data")
    bystander.write_text("not of this file")
    assert to_onnx(small, old, verify=False).path == old
    assert bystander.read_text() == "not of this file"


def test_without_verification_the_file_is_still_checked(small: fxprune.TracedModule, tmp_path: Path) -> None:
    assert to_onnx(small, tmp_path / "a.onnx", verify=False).comparison is None
    onnx.checker.check_model(tmp_path / "a.onnx", full_check=True)


# ---- what is refused


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_parameters_that_are_not_finite(old: Path, value: float) -> None:
    model = Network()
    with torch.no_grad():
        model.head.weight[0, 0] = value
        model.norm.bias[1] = value
    traced = fxprune.trace(model, torch.randn(2, 2, 6, 6), modes=("eval",))
    with pytest.raises(ExportError, match=r"NaN or inf in norm\.bias, head\.weight: refused"):
        to_onnx(traced, old)
    assert_untouched(old)


def test_refuses_nan_in_a_buffer_and_lets_inf_pass(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0, -float("inf")]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + self.mask).softmax(-1)

    model = Masked()
    traced = fxprune.trace(model, torch.ones(2, 2), modes=("eval",))
    to_onnx(traced, tmp_path / "a.onnx")
    model.mask[0] = float("nan")
    with pytest.raises(ExportError, match="NaN or inf in mask"):
        to_onnx(traced, tmp_path / "a.onnx")


@pytest.mark.parametrize("external", [False, True])
def test_a_file_with_a_wrong_weight_is_kept_aside(
    small: fxprune.TracedModule, old: Path, monkeypatch: pytest.MonkeyPatch, external: bool
) -> None:
    if external:
        monkeypatch.setattr(onnx_files, "SINGLE_FILE_BYTES", 0)

    def corrupt(program: ONNXProgram, path: Path) -> None:
        onnx_files.save(program, path)
        beside = [part.name for part in path.parent.iterdir() if part != path]
        model = onnx.load(path)
        tensor = next(t for t in model.graph.initializer if t.name == "0.weight")
        values = numpy_helper.to_array(tensor).copy()
        values[1, 2] += 0.01
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        onnx.save(model, path, save_as_external_data=external, location=next(iter(beside), None), size_threshold=0)

    monkeypatch.setattr(onnx_export, "save", corrupt)
    with pytest.raises(ExportError, match=r"computes something else .*model\.mismatch\.onnx'") as caught:
        to_onnx(small, old)
    assert "NO limit" in str(caught.value)
    assert old.read_text() == "old"
    aside = old.with_name("model.mismatch.onnx")
    assert len(list(old.parent.iterdir())) == 3 if external else 2
    assert not compare(small, aside, inputs=torch.ones(2, 4)).ok


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({"input_names": ["a", "b"]}, "the model has 1 inputs and 1 outputs"),
        ({"input_names": ["a"], "output_names": ["a"]}, "must differ from each other"),
        ({"output_names": ["0.weight"]}, r"from the parameters' \(0\.weight\)"),
        ({"opset": 99}, r"opset 99 was asked for; torch and onnx can write this model in opset \d+"),
    ],
)
def test_refuses_names_and_opsets_that_cannot_be(
    small: fxprune.TracedModule, old: Path, names: dict[str, Any], says: str
) -> None:
    with pytest.raises(ArgumentError, match=says):
        to_onnx(small, old, **names)
    assert_untouched(old)


def test_refuses_what_is_not_a_traced_module_with_an_eval_graph(old: Path) -> None:
    with pytest.raises(ArgumentTypeError, match="was given a Linear"):
        to_onnx(nn.Linear(2, 2), old)  # type: ignore[arg-type]
    traced = fxprune.trace(nn.Linear(2, 2), torch.ones(2, 2), modes=("train",))
    with pytest.raises(ExportError, match="needs the eval graph; captured: train"):
        to_onnx(traced, old)
    assert_untouched(old)


class Eigenvalues(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(x).real


def test_names_an_operator_that_onnx_lacks(old: Path) -> None:
    traced = fxprune.trace(Eigenvalues(), torch.eye(3).expand(2, 3, 3).clone(), modes=("eval",))
    with pytest.raises(ExportError, match=r"cannot translate .*aten\.linalg_eig"):
        to_onnx(traced, old)
    assert_untouched(old)


def test_names_an_operator_that_onnxruntime_lacks(old: Path) -> None:
    traced = fxprune.trace(nn.Conv2d(1, 1, 1).double(), torch.ones(2, 1, 3, 3).double(), modes=("eval",))
    with pytest.raises(ExportError, match=r"model\.onnx' .*implementation for Conv.*needs the model in float32"):
        to_onnx(traced, old)
    assert_untouched(old)


def test_a_full_disk_leaves_the_old_file(
    small: fxprune.TracedModule, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(program: ONNXProgram, path: Path) -> None:
        path.write_bytes(b"half")
        Path("/dev/full").write_text("rest")

    monkeypatch.setattr(onnx_export, "save", full)
    with pytest.raises(ExportError, match="the disk is full"):
        to_onnx(small, old)
    assert_untouched(old)


def test_bad_paths(small: fxprune.TracedModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match="it is a folder"):
        to_onnx(small, tmp_path)
    with pytest.raises(ExportError, match="does not exist"):
        to_onnx(small, tmp_path / "no" / "model.onnx")

    def refuse(**_: Any) -> str:
        raise OSError(errno.EACCES, "denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(ExportError, match="read-only"):
        to_onnx(small, tmp_path / "model.onnx")
