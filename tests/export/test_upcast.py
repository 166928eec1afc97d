"""Files of bfloat16 are run in float32, and their graphs and weights held to the module's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional

import fxprune
from fxprune.errors import ArgumentError, ExportError
from fxprune.export import onnx as exporting
from fxprune.export import onnx_files, to_onnx, upcast
from fxprune.export.wire import read
from tests.tensor_memory import most_private

B = torch.bfloat16


class Image(nn.Module):
    """Convolutions with batch norms, pooling, and numbers that bfloat16 rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.up, self.head = nn.ConvTranspose2d(12, 6, 2, stride=2), nn.Linear(6, 5)
        self.norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.leaky_relu(self.norm(self.stem(x)), 0.013) * 0.1 + 0.7
        x = functional.max_pool2d(self.up(x), 2).mean((2, 3))
        return self.head(torch.add(x, x.abs(), alpha=0.3)).softmax(-1)


class Text(nn.Module):
    """Attention over ten features a head, whose scale bfloat16 rounds, and a norm that computes in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.joint, self.norm = nn.Embedding(30, 20), nn.Linear(20, 60), nn.RMSNorm(20, eps=1e-6)
        self.out = nn.Linear(20, 30, bias=False)
        self.out.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.tokens(ids)
        wide = x.float()
        x = self.norm((wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype))
        q, k, v = self.joint(x).reshape(*ids.shape, 3, 2, 10).permute(2, 0, 3, 1, 4).unbind()
        x = x + functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        return {"logits": self.out(x * scale), "norm": wide.sum(-1)}


def image() -> fxprune.TracedModule:
    torch.manual_seed(0)
    return fxprune.trace(Image().to(B), (torch.randn(2, 3, 8, 8, dtype=B),), modes=("eval",))


def text() -> fxprune.TracedModule:
    torch.manual_seed(0)
    inputs = torch.randint(30, (2, 7)), torch.tensor(1.5, dtype=B)
    return fxprune.trace(Text().to(B), inputs, modes=("eval",))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(("network", "beside"), [(image, False), (text, True), pytest.param(text, False, marks=SLOW)])
def test_a_file_of_bfloat16_is_run_in_float32(
    network: Any, beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if beside:
        monkeypatch.setattr(onnx_files, "SINGLE_FILE_BYTES", 0)
    final = network()
    report = to_onnx(final, tmp_path / "a.onnx")
    assert report.comparison is not None
    assert report.comparison.ok
    assert {row.dtype for row in report.comparison.rows} == {"float32"}
    assert max(row.max_rel or 0.0 for row in report.comparison.rows) < 1e-5
    assert len({row.call for row in report.comparison.rows}) == 3
    assert "with float32 in the place of bfloat16" in report.notes[0]
    assert "as near as float32 rounds" in report.notes[0]
    assert len(list(tmp_path.iterdir())) == 1 + beside  # nothing of the twin stays
    model = onnx.load(report.path)
    onnx.checker.check_model(model, full_check=True)
    stored = {weight.name: weight.data_type for weight in model.graph.initializer}
    wide = {name for name, _ in final.named_parameters() if stored[name] != onnx.TensorProto.BFLOAT16}
    assert wide <= {"norm.weight"}  # which an RMSNorm reads in float32


def test_the_twin_is_what_is_compared_with_another_computation_of_the_weights_in_float32(tmp_path: Path) -> None:
    final, x = image(), torch.randn(3, 3, 8, 8, dtype=B)
    path = to_onnx(final, tmp_path / "a.onnx").path
    wide = Image().eval()
    wide.load_state_dict(final.state_dict())  # the same numbers, in float32
    with upcast.twin(path, ("CPUExecutionProvider",)) as session:
        (found,) = session.run(x).values()
    # 0.1, 0.7 and 0.3 are rounded in the file
    torch.testing.assert_close(found, wide(x.float()), rtol=1e-2, atol=1e-3)
    reference = upcast.Upcast(final, None)
    (own,) = reference.run((x,), {}).values()
    torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-6)
    assert not torch.equal(own, wide(x.float()))
    assert torch.equal(final(x), final(x.clone()))
    assert {own.dtype for own in final.parameters()} == {B}


@pytest.mark.parametrize("network", [image, pytest.param(text, marks=SLOW)])
def test_a_wrong_weight_is_found(network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def saved(program: Any, path: Path) -> None:
        onnx_files.save(program, path)
        model = onnx.load(path)
        (weight,) = [own for own in model.graph.initializer if own.name in ("head.bias", "joint.bias")]
        bits = np.frombuffer(weight.raw_data, np.uint16).copy()
        bits[0] ^= 1 << 15
        bits[0] += 1 << 8  # the sign, and twice the size or more
        weight.raw_data = bits.tobytes()
        onnx.save(model, path)

    monkeypatch.setattr(exporting, "save", saved)
    with pytest.raises(ExportError, match="computes something else than its source; kept as") as found:
        to_onnx(network(), tmp_path / "a.onnx")
    assert "first difference of a.onnx in float32" in str(found.value)
    assert [item.name for item in tmp_path.iterdir()] == ["a.mismatch.onnx"]


def test_types_that_do_not_fit_are_found_though_the_twin_would_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = image()
    with pytest.raises(ExportError, match="types in the file do not fit each other.*bfloat16"):
        to_onnx(final, tmp_path / "a.onnx", opset=20)  # its convolutions take none
    assert not list(tmp_path.iterdir())
    assert to_onnx(final, tmp_path / "a.onnx", opset=23).opset == 23


def test_numbers_that_are_rounded_when_the_file_is_written_are_told(tmp_path: Path) -> None:
    class Ramp(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.linspace(0, 1, 40, dtype=x.dtype)

    traced = fxprune.trace(Ramp(), (torch.randn(2, 40, dtype=B),), modes=("eval",))
    report = to_onnx(traced, tmp_path / "a.onnx")
    assert report.comparison is not None
    assert 1e-4 < max(row.max_rel or 0.0 for row in report.comparison.rows) <= 2**-7
    assert "as near as numbers are when they are rounded to bfloat16" in report.notes[0]
    with pytest.raises(ExportError, match="computes something else"):
        to_onnx(traced, tmp_path / "a.onnx", rtol=1e-4)


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_other_precisions_are_refused(precision: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=f"precision '{precision}' was asked for of a module that computes in bfl"):
        to_onnx(image(), tmp_path / "a.onnx", precision=precision)


def test_a_file_read_without_its_weights_is_the_same_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    traced = fxprune.trace(nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20)), torch.randn(2, 40))
    path = to_onnx(traced, tmp_path / "a.onnx", verify=False).path
    found, expected = read(path), onnx.load(path)
    outside = {own.name for own in found.graph.initializer if own.external_data}
    assert outside == {"0.weight", "2.weight"}  # of 1 KiB and more
    onnx.load_external_data_for_model(found, str(tmp_path))
    for own in found.graph.initializer:
        own.ClearField("external_data")
        own.ClearField("data_location")
    assert found == expected
    # onnxruntime reads it, too
    (tmp_path / "b.onnx").write_bytes(read(path).SerializeToString())
    x = torch.randn(3, 40)
    (value,) = onnxruntime.InferenceSession(tmp_path / "b.onnx").run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(value), traced(x), rtol=1e-5, atol=1e-6)


def test_a_verification_holds_one_weight_at_a_time(tmp_path: Path) -> None:
    layers, held = 24, []

    def run(path: Path, width: int) -> None:
        with upcast.twin(path, ("CPUExecutionProvider",)) as session:
            session.run(torch.randn(2, width, dtype=B))

    for width in (64, 1024, 1024):  # with the small one, what is loaded once
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).to(B)
        traced = fxprune.trace(model, (torch.randn(2, width, dtype=B),), modes=("eval",))
        path = to_onnx(traced, tmp_path / "a.onnx", verify=False).path
        held.append(most_private(lambda: run(path, width)) / (layers * width * width * 2))  # noqa: B023
    assert min(held[1:]) < 0.5  # in float32 all of them would be 2
