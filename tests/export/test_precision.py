"""float16, int8 and sparse files: sizes, stated errors, a second runtime, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import fxprune
from fxprune.demo import DigitNet
from fxprune.errors import ArgumentError, CompareError, ExportError, FxpruneError, InputError, ProviderWarning
from fxprune.export import ExportReport, Session, compare, onnx_files, to_onnx
from fxprune.export import onnx as exporting
from fxprune.export.metadata import digest
from fxprune.export.session import PRECISION_TOLERANCES
from tests.tensor_memory import most_private


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


@pytest.mark.parametrize("precision", ["float32", "int8", pytest.param("float16", marks=pytest.mark.slow)])
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


@pytest.mark.parametrize("precision", ["float16", "int8", pytest.param("float32", marks=pytest.mark.slow)])
def test_weights_beside_the_file_in_every_precision(
    final: fxprune.TracedModule, tmp_path: Path, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_files, "SINGLE_FILE_BYTES", 0)
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


def test_float16_and_sparse_files_are_made_one_weight_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, width = 24, 1024
    size, held = layers * width * width * 4, []

    def rewritten(draft: Any, change: Any) -> None:
        held.append(most_private(lambda: onnx_files.rewrite(draft, change)) / size)

    monkeypatch.setattr(exporting, "rewrite", rewritten)
    for own in (64, width, width, width):  # with the small one, what is loaded once; a long run adds to some
        model = nn.Sequential(*(nn.Linear(own, own, bias=False) for _ in range(layers)))
        traced = fxprune.trace(model, (torch.randn(2, own),), modes=("eval",))
        fxprune.prune.l1_unstructured(traced, "*.weight", 0.9)
        traced = fxprune.finalize(traced, shrink=False)
        half = to_onnx(traced, tmp_path / "half.onnx", precision="float16", verify=False)
        sparse = to_onnx(traced, tmp_path / "sparse.onnx", sparse=True, verify=False)
    assert half.size < 0.51 * size
    assert sparse.size < 0.31 * size
    assert max(min(held[2::2]), min(held[3::2])) < 0.25  # of 24 weights one, and what the conversion makes of it
    assert compare(traced, half.path, sparse.path, inputs=torch.randn(3, width)).ok


# ---- the demo's network, trained, pruned and trained on


@dataclass(frozen=True)
class Digits:
    """The pruned network, its files by precision, and test images it has not seen, with their labels."""

    final: fxprune.TracedModule
    files: dict[str, ExportReport]
    images: torch.Tensor
    labels: torch.Tensor

    def accuracy(self, logits: torch.Tensor) -> float:
        return (logits.argmax(1) == self.labels).double().mean().item()


def fit(traced: fxprune.TracedModule, images: torch.Tensor, labels: torch.Tensor, epochs: int, rate: float) -> None:
    optimizer = torch.optim.SGD(traced.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * -(-len(images) // 64))
    traced.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(traced(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    traced.eval()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    torch.manual_seed(0)
    found = load_digits()
    images, labels = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16, torch.tensor(found.target)
    test, own = torch.randperm(len(images)).split([600, len(images) - 600])
    traced = fxprune.trace(DigitNet(), images[own[:2]])
    fit(traced, images[own], labels[own], 3, 0.1)
    fxprune.prune.channels(traced, macs=0.5)
    fit(traced, images[own], labels[own], 2, 0.1)
    final, folder = fxprune.finalize(traced), tmp_path_factory.mktemp("digits")
    files = {
        "float32": to_onnx(final, folder / "float32.onnx"),
        "int8": to_onnx(final, folder / "int8.onnx", precision="int8", calibration=list(images[own[:256]].split(64))),
    }
    return Digits(final, files, images[test], labels[test])


@pytest.mark.slow
def test_int8_keeps_the_accuracy_of_the_pruned_demo(digits: Digits) -> None:
    assert digits.final.plan is not None
    assert digits.final.plan.macs[1] <= 0.5 * digits.final.plan.macs[0]
    full, small = (Session(file.path).run((digits.images,), {})["output"] for file in digits.files.values())
    assert not torch.equal(full, small)
    assert digits.files["int8"].size < 0.45 * digits.files["float32"].size
    assert digits.accuracy(full) > 0.95
    assert abs(digits.accuracy(small) - digits.accuracy(full)) <= 0.01


# ---- other runtimes


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 16)
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        q, k, v = self.qkv(self.norm(x)).reshape(*ids.shape, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind()
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + y.transpose(1, 2).reshape(x.shape)
        return x + self.down(functional.gelu(self.up(x)))


def assert_reference_agrees(path: Path, final: fxprune.TracedModule, x: torch.Tensor) -> None:
    feed = dict.fromkeys(Session(path).inputs, x.numpy())
    (got,) = ReferenceEvaluator(os.fspath(path)).run(None, feed)  # type: ignore[misc]
    with torch.no_grad():
        want = final(x).numpy()
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_onnx_reference_evaluator_agrees(final: fxprune.TracedModule, export: Callable[..., ExportReport]) -> None:
    assert_reference_agrees(export().path, final, BATCHES[0])


def test_onnx_reference_evaluator_agrees_on_attention(tmp_path: Path) -> None:
    traced = fxprune.trace(Attention(), torch.randint(20, (2, 5)), modes=("eval",))
    fxprune.prune.channels(traced, 0.5, targets="up", round_to=1)
    final = fxprune.finalize(traced)
    assert final.plan is not None
    assert final.plan.removed
    assert_reference_agrees(to_onnx(final, tmp_path / "a.onnx").path, final, torch.randint(20, (4, 5)))


def test_onnx_reference_evaluator_agrees_on_the_pruned_demo(digits: Digits) -> None:
    assert_reference_agrees(digits.files["float32"].path, digits.final, digits.images[:8])


NODE = """
const ort = require(process.argv[1]);
const {path, dims, data} = JSON.parse(require('fs').readFileSync(0));
ort.env.wasm.numThreads = 1;
(async () => {
  const session = await ort.InferenceSession.create(path);
  const x = new ort.Tensor('float32', Float32Array.from(data), dims);
  const result = await session.run({[session.inputNames[0]]: x});
  console.log(JSON.stringify(Array.from(result[session.outputNames[0]].data)));
})();
"""


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("package", ["onnxruntime-node", "onnxruntime-web"])
def test_the_pruned_demo_runs_in_node(package: str, precision: str, request: pytest.FixtureRequest) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is missing")
    if subprocess.run([node, "-e", f"require.resolve('{package}')"], capture_output=True, check=False).returncode:
        pytest.skip(f"node does not find the package {package}: npm install it, here or in a folder of NODE_PATH")
    digits: Digits = request.getfixturevalue("digits")  # trained only where it is needed
    path, x = digits.files[precision].path, digits.images[:64]
    call = json.dumps({"path": os.fspath(path), "dims": x.shape, "data": x.flatten().tolist()})
    # as an argument, for a script file would look for packages from its own folder
    done = subprocess.run([node, "-e", NODE, package], input=call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    got = np.array(json.loads(done.stdout), np.float32).reshape(64, 10)
    with torch.no_grad():
        want = digits.final(x).numpy()
    # int8 kernels differ between processors: it is held to what the file states
    assert (
        np.abs(got - want).max()
        <= {"float32": 1e-5, "int8": PRECISION_TOLERANCES["int8"]}[precision] * np.abs(want).max()
    )


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
    monkeypatch.setattr("fxprune.export.int8._Dynamic.quantized", lambda _: 1 / 0)
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
