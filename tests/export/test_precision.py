"""float16, int8 and sparse files: sizes, stated errors, a second runtime, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from torch import nn

import fxprune
from fxprune.demo import DigitNet
from fxprune.errors import ArgumentError, CompareError, ExportError, FxpruneError, InputError, ProviderWarning
from fxprune.export import ExportReport, Session, compare, to_onnx
from fxprune.export import onnx as module_under_test
from fxprune.export.source import digest


class Wide(nn.Module):
    """Weights that are most of the file: a convolution, a shortcut, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.conv = nn.Conv2d(32, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 300)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        return self.head((x + self.norm(self.conv(x))).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def final() -> fxprune.TracedModule:
    torch.manual_seed(0)
    traced = fxprune.trace(Wide(), torch.randn(2, 3, 6, 6), modes=("eval",))
    for name in ("conv.weight", "head.weight"):
        fxprune.prune.l1_unstructured(traced, name, amount=0.9)
    return fxprune.finalize(traced)


@pytest.fixture(scope="module")
def export(final: fxprune.TracedModule, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ExportReport]:
    """`to_onnx`, once for each set of options."""
    reports: dict[str, ExportReport] = {}

    def run(**options: Any) -> ExportReport:
        key = repr(options)
        if key not in reports:
            reports[key] = to_onnx(final, tmp_path_factory.mktemp("files") / "model.onnx", **options)
        return reports[key]

    return run


BATCHES = [torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def kinds(path: Path) -> set[int]:
    return {t.data_type for t in onnx.load(path).graph.initializer if len(t.dims) > 1}


def test_float16_keeps_float32_ends_by_choice(final: fxprune.TracedModule, export: Callable[..., ExportReport]) -> None:
    full, half = export(), export(precision="float16")
    assert (full.precision, half.precision) == ("float32", "float16")
    assert half.size < 0.6 * full.size
    assert kinds(half.path) == {TensorProto.FLOAT16}
    assert Session(half.path).inputs["x"].startswith("tensor(float)")
    assert half.comparison is not None
    assert 1e-5 < max(row.max_rel or 0 for row in half.comparison.rows) < 1e-2
    ends = export(precision="float16", keep_io=False)
    assert Session(ends.path).inputs["x"].startswith("tensor(float16)")
    result = compare(final, half.path, ends.path, inputs=BATCHES)  # held to what their metadata state
    assert result.ok, result.table()
    assert not compare(final, half.path, inputs=BATCHES, rtol=1e-6).ok


def test_int8_static_and_dynamic(
    final: fxprune.TracedModule, export: Callable[..., ExportReport], tmp_path: Path
) -> None:
    named = [{"x": batch} for batch in BATCHES]
    for report in (export(precision="int8"), export(precision="int8", calibration=named)):
        assert report.size < 0.45 * export().size
        assert TensorProto.INT8 in kinds(report.path)
        assert report.comparison is not None
        assert report.comparison.ok
        assert 1e-4 < max(row.max_rel or 0 for row in report.comparison.rows) < 0.1
    assert [row.shape[0] for row in report.comparison.rows] == [4, 4, 4, 5, 1]  # verified on the calibration batches
    with pytest.raises(ExportError, match="computes something else"):
        to_onnx(final, tmp_path / "strict.onnx", precision="int8", calibration=iter(BATCHES), rtol=1e-4)
    assert not (tmp_path / "strict.onnx").exists()


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_sparse_initializers_make_the_file_smaller(export: Callable[..., ExportReport], precision: Any) -> None:
    options = {"precision": precision} if precision != "float32" else {}
    report, dense = export(**options, sparse=True), export(**options)
    assert dense.size == dense.dense_size == report.dense_size
    graph = onnx.load(report.path).graph
    stored = {tensor.values.name for tensor in graph.sparse_initializer}
    if precision == "float32":
        assert stored == {"conv.weight", "head.weight"}
        assert report.size < 0.5 * dense.size
    assert report.size <= dense.size
    assert not stored.intersection(tensor.name for tensor in graph.initializer)
    assert f"{len(stored)} initializers are stored sparse" in report.notes[0]
    assert "latency is that of the dense file" in report.notes[0]
    assert compare(dense.path, report.path, inputs=BATCHES, rtol=0, atol=0).ok
    assert json.loads(json.dumps(report.to_dict()))["notes"] == list(report.notes)


def test_what_is_not_sparse_enough_stays_dense(tmp_path: Path) -> None:
    traced = fxprune.trace(nn.Linear(40, 40), torch.randn(2, 40), modes=("eval",))
    fxprune.prune.l1_unstructured(traced, "weight", amount=0.6)
    report = to_onnx(traced, tmp_path / "a.onnx", sparse=True)
    assert report.size == report.dense_size
    assert not onnx.load(report.path).graph.sparse_initializer


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_weights_beside_the_file_in_every_precision(
    final: fxprune.TracedModule, tmp_path: Path, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_under_test, "SINGLE_FILE_BYTES", 0)
    report = to_onnx(final, tmp_path / "a.onnx", precision=precision)
    assert len(list(tmp_path.iterdir())) == 2
    assert report.size == sum(part.stat().st_size for part in tmp_path.iterdir())
    assert compare(final, report.path, inputs=BATCHES).ok


def test_the_file_says_what_it_is(final: fxprune.TracedModule, export: Callable[..., ExportReport]) -> None:
    for precision in ("float32", "float16", "int8"):
        path = export(**({"precision": precision} if precision != "float32" else {})).path
        found = Session(path).metadata
        assert found["fxprune.version"] == fxprune.__version__
        assert found["fxprune.precision"] == precision
        assert found["fxprune.digest"] == digest(final)
        origins = {
            p.value for node in onnx.load(path).graph.node for p in node.metadata_props if p.key == "fxprune.node"
        }
        assert {"relu", "mean", "linear"} <= origins
        assert origins <= {node.name for node in final.graphs["eval"].nodes}


def test_the_digest_follows_the_weights(final: fxprune.TracedModule) -> None:
    model = Wide()
    traced = fxprune.trace(model, torch.randn(2, 3, 6, 6), modes=("eval",))
    before = digest(traced)
    assert digest(traced) == before != digest(final)
    with torch.no_grad():
        model.head.bias[0] += 1
    assert digest(traced) != before


def test_onnx_reference_evaluator_agrees(export: Callable[..., ExportReport]) -> None:
    path = export().path
    (got,) = ReferenceEvaluator(os.fspath(path)).run(None, {"x": BATCHES[0].numpy()})  # type: ignore[misc]
    want = Session(path).run((BATCHES[0],), {})["output"].numpy()
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


NODE = """
const ort = require('onnxruntime-node'), fs = require('fs');
(async () => {
  const session = await ort.InferenceSession.create(process.argv[2]);
  const x = new Float32Array(fs.readFileSync(process.argv[3]).buffer.slice(0, 4 * 2 * 64));
  const result = await session.run({[session.inputNames[0]]: new ort.Tensor('float32', x, [2, 1, 8, 8])});
  fs.writeFileSync(process.argv[4], Buffer.from(result[session.outputNames[0]].data.buffer));
})();
"""


def test_the_demo_network_runs_in_onnxruntime_node(tmp_path: Path) -> None:
    node = shutil.which("node")
    found = node and subprocess.run([node, "-e", "require('onnxruntime-node')"], capture_output=True, check=False)
    if not found or found.returncode:
        pytest.skip("node with the package onnxruntime-node is missing")
    x = torch.randn(2, 1, 8, 8)
    traced = fxprune.trace(DigitNet(), x, modes=("eval",))
    path = to_onnx(traced, tmp_path / "digits.onnx").path
    (tmp_path / "run.js").write_text(NODE)
    (tmp_path / "x").write_bytes(x.numpy().tobytes() + bytes(8192))
    subprocess.run([node, tmp_path / "run.js", path, tmp_path / "x", tmp_path / "y"], check=True)  # type: ignore[list-item]
    got = np.frombuffer((tmp_path / "y").read_bytes(), np.float32).reshape(2, 10)
    want = Session(path).run((x,), {})["logits"].numpy()
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


# ---- bad input


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"precision": "int4"}, ArgumentError, "'int4' was asked for; there are float32, float16, int8"),
        ({"calibration": BATCHES}, ArgumentError, "'float32' was asked for with calibration"),
        ({"precision": "int8", "calibration": []}, ArgumentError, "holds no batch"),
        ({"precision": "int8", "calibration": {"wrong": BATCHES[0]}}, InputError, "wrong"),
        ({"precision": "int8", "calibration": torch.ones(2, 3, 5, 5)}, InputError, "has shape"),
        ({"precision": "int8", "calibration": BATCHES[0].double()}, InputError, "float64"),
        ({"precision": "int8", "calibration": ["x"]}, CompareError, "inputs hold a str"),
        ({"providers": ["NoSuchProvider"]}, ExportError, "this build offers"),
    ],
)
def test_bad_options_leave_the_old_file(
    final: fxprune.TracedModule, tmp_path: Path, options: Any, kind: type[FxpruneError], says: str
) -> None:
    old = tmp_path / "model.onnx"
    old.write_text("old")
    with pytest.raises(kind, match=says):
        to_onnx(final, old, **options)
    assert old.read_text() == "old"
    assert list(tmp_path.iterdir()) == [old]


def test_a_failure_of_the_quantizer_is_an_export_error(
    final: fxprune.TracedModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxprune.export.precision.quantize_dynamic", lambda *a, **k: 1 / 0)
    with pytest.raises(ExportError, match="cannot quantize the model to int8: ZeroDivisionError"):
        to_onnx(final, tmp_path / "a.onnx", precision="int8")
    assert not list(tmp_path.iterdir())


def test_a_provider_that_is_dropped_is_reported(
    export: Callable[..., ExportReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = export().path
    build = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda path, options, providers: build(path, options, providers=providers[1:])
    )
    with pytest.warns(ProviderWarning, match=r"onnxruntime runs it with \{'CPUExecutionProvider': \d+\}"):
        session = Session(path, ["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert session.providers == ["CPUExecutionProvider"]


def test_bound_inputs_give_the_same(export: Callable[..., ExportReport]) -> None:
    session = Session(export().path)
    call = session.bind(session.feed((BATCHES[0],), {}))
    (value,) = call()
    assert np.array_equal(value.numpy(), session.run((BATCHES[0],), {})["output"].numpy())
