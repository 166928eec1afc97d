"""Graphs are translated as they were captured: without another capture, to the same outputs at every size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

import fxprune
from fxprune.export import at_hand


class Layer(nn.Module):
    """A decoder's layer: RMS norm, causal attention with shared keys, a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.post = nn.RMSNorm(16), nn.RMSNorm(16)
        self.q, self.kv, self.o = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        data = self.norm(x)
        q = self.q(data).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = self.kv(data).unflatten(-1, (2, 8)).transpose(1, 2).chunk(2, -1)
        k, v = k.to(x.dtype).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        heads = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(heads.transpose(1, 2).flatten(2))
        data = self.post(x)
        return x + self.down(functional.silu(self.gate(data)) * self.up(data))


def decoder(layers: int, **options: Any) -> tuple[nn.Module, fxprune.TracedModule]:
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer() for _ in range(layers)), nn.Linear(16, 5)).eval()
    shapes = ({0: Dim("batch", max=8), 1: Dim("length", max=64)},)
    options = {"dynamic_shapes": shapes, "modes": ("eval",)} | options
    return model, fxprune.trace(model, (torch.randn(2, 6, 16),), **options)


def assert_equal(path: Path, model: Any, *inputs: Tensor) -> None:
    session = onnxruntime.InferenceSession(path)
    for x in inputs:
        expected = model(x)
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        for value, wanted in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True):
            np.testing.assert_allclose(value, wanted.detach(), rtol=1e-5, atol=1e-5)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What torch captures from here on."""
    found: list[object] = []
    export = torch.export.export

    def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found.append(module)
        return export(module, *args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counted)
    return found


def test_a_decoder_is_written_without_another_capture(tmp_path: Path, captures: list[object]) -> None:
    model, traced = decoder(2)
    captures.clear()
    report = fxprune.export.to_onnx(traced, tmp_path / "model.onnx")
    assert report.comparison is not None
    assert len({row.call for row in report.comparison.rows}) == 3
    assert not captures
    assert_equal(tmp_path / "model.onnx", model, torch.randn(1, 1, 16), torch.randn(3, 11, 16))


def test_what_finalize_leaves_is_written_without_another_capture(tmp_path: Path, captures: list[object]) -> None:
    _, traced = decoder(2)
    fxprune.prune.channels(traced, macs=0.6, round_to=1)
    final = fxprune.finalize(traced, align=1)
    captures.clear()
    fxprune.export.to_onnx(final, tmp_path / "model.onnx", verify=False)
    assert not captures
    assert_equal(tmp_path / "model.onnx", traced, torch.randn(1, 1, 16), torch.randn(3, 11, 16))


def test_layers_of_one_form_are_taken_apart_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    make_fx = at_hand.make_fx

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts[-1] += 1
        return make_fx(*args, **kwargs)

    monkeypatch.setattr(at_hand, "make_fx", counted)
    for layers in (2, 4):
        counts.append(0)
        fxprune.export.to_onnx(decoder(layers)[1], tmp_path / "model.onnx", verify=False)
    assert counts[0] == counts[1] > 0


def test_the_capture_at_hand_learns_nothing(tmp_path: Path) -> None:
    _, traced = decoder(1)
    (value,) = (node.meta["val"] for node in traced.graph.find_nodes(op="placeholder"))
    sizes = value.fake_mode.shape_env
    before = len(sizes.guards), dict(sizes.replacements), dict(sizes.var_to_range), str(traced.graph)
    shapes = [str(getattr(node.meta.get("val"), "shape", "")) for node in traced.graph.nodes]
    fxprune.export.to_onnx(traced, tmp_path / "model.onnx")
    assert (len(sizes.guards), dict(sizes.replacements), dict(sizes.var_to_range), str(traced.graph)) == before
    assert [str(getattr(node.meta.get("val"), "shape", "")) for node in traced.graph.nodes] == shapes


class Parts(nn.Module):
    """Results that are the inputs of operators that do nothing, and operators with several results."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        doubled = x * 2
        first, second = doubled.chunk(2, -1)
        values, _ = x.sort(-1)
        return functional.dropout(doubled, 0.5, self.training), x.to(torch.float32), first, *second.unbind(-1), values


def test_results_that_are_operands_and_several_results_of_one_operator(tmp_path: Path, captures: list[object]) -> None:
    traced = fxprune.trace(Parts().eval(), (torch.randn(3, 4),), modes=("eval",))
    captures.clear()
    fxprune.export.to_onnx(traced, tmp_path / "model.onnx")
    assert not captures
    assert_equal(tmp_path / "model.onnx", Parts().eval(), torch.randn(5, 4))


class Writes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        view = y[:, :2]
        y.relu_()
        return view + 1


def test_what_writes_is_captured_again(tmp_path: Path, captures: list[object]) -> None:
    traced = fxprune.trace(Writes().eval(), (torch.randn(3, 4),), modes=("eval",))
    captures.clear()
    report = fxprune.export.to_onnx(traced, tmp_path / "model.onnx")
    assert captures
    assert any("captured once more" in note and "writes" in note for note in report.notes)
    assert_equal(tmp_path / "model.onnx", Writes().eval(), torch.randn(5, 4))


def test_other_free_sizes_are_captured_again(tmp_path: Path, captures: list[object]) -> None:
    model, traced = decoder(1)
    captures.clear()
    report = fxprune.export.to_onnx(traced, tmp_path / "model.onnx", dynamic_shapes=None)
    assert captures
    assert not any("captured once more" in note for note in report.notes)  # it was asked for
    assert onnxruntime.InferenceSession(tmp_path / "model.onnx").get_inputs()[0].shape == [2, 6, 16]
    assert_equal(tmp_path / "model.onnx", model, torch.randn(2, 6, 16))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True)])
def test_norms_with_statistics_are_no_writers_in_eval_mode(
    norm: nn.Module, tmp_path: Path, captures: list[object]
) -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3), norm, nn.ReLU()).eval()
    traced = fxprune.trace(model, (torch.randn(3, 4, 8),), modes=("eval",))
    captures.clear()
    fxprune.export.to_onnx(traced, tmp_path / "model.onnx")
    assert not captures
    assert_equal(tmp_path / "model.onnx", model, torch.randn(5, 4, 8))


def test_the_report_says_what_verification_took(tmp_path: Path) -> None:
    _, traced = decoder(1)
    report = fxprune.export.to_onnx(traced, tmp_path / "model.onnx")
    assert 0 < report.verification_seconds < report.seconds
    assert f"{report.verification_seconds:.1f} s" in str(report)
    assert fxprune.export.to_onnx(traced, tmp_path / "model.onnx", verify=False).verification_seconds == 0


def test_a_fault_of_the_first_way_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, traced = decoder(1)

    def broken(module: object) -> object:
        raise KeyError("a fault of fxprune's own")

    monkeypatch.setattr("fxprune.export.onnx.program_at_hand", broken)
    with pytest.raises(KeyError, match="own"):
        fxprune.export.to_onnx(traced, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
