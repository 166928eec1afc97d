"""int8 files: those of onnxruntime's own quantization, made weight by weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from torch import nn

import fxprune
from fxprune.export import Session, int8, onnx_files
from fxprune.export import onnx as exporting
from tests.tensor_memory import most_private


class _Mixed(nn.Module):
    """Embedding, convolution, a recurrent layer, products with and without a bias, a branch that reads weights."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 32)
        self.conv = nn.Conv1d(32, 24, 3, padding=1)
        self.cell = nn.LSTM(24, 16, batch_first=True)
        self.rise, self.fall = nn.Linear(16, 300), nn.Linear(300, 16)
        self.free = nn.Linear(16, 40, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.conv(self.table(ids).transpose(1, 2)).relu().transpose(1, 2)
        hidden = self.cell(hidden)[0]
        hidden = self.fall(self.rise(hidden).relu())
        pooled = hidden.mean(1)
        pooled = pooled + self.fall(self.rise(pooled).relu())
        result: torch.Tensor = torch.cond(
            pooled.sum() > 0, lambda x: self.free(x), lambda x: self.free(x) * 2.0, (pooled,)
        )
        return result


class _Batches(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, batches: list[dict[str, np.ndarray]]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def _parts(model: onnx.ModelProto) -> tuple[dict[str, np.ndarray], list[bytes], list[bytes]]:
    """Weights by name in order, nodes without what says where they come from, and shapes."""
    weights = {weight.name: onnx.numpy_helper.to_array(weight) for weight in model.graph.initializer}
    shapes = sorted(value.SerializeToString() for value in model.graph.value_info)
    _strip(model.graph)
    return weights, [node.SerializeToString(deterministic=True) for node in model.graph.node], shapes


def _strip(graph: onnx.GraphProto) -> None:
    graph.ClearField("value_info")
    for weight in graph.initializer:
        weight.ClearField("data_location")
    for node in graph.node:
        node.ClearField("metadata_props")
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _strip(attribute.g)


@pytest.mark.slow
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("is_static", [False, True])
def test_a_file_is_what_onnxruntime_makes_of_the_one_in_float32(
    is_static: bool, beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if beside:
        monkeypatch.setattr(onnx_files, "SINGLE_FILE_BYTES", 0)
    torch.manual_seed(0)
    traced = fxprune.trace(_Mixed().eval(), (torch.randint(30, (2, 5)),), modes=("eval",))
    batches = [torch.randint(30, (count, 5)) for count in (3, 4)]
    full, found = tmp_path / "full.onnx", tmp_path / "found.onnx"
    fxprune.export.to_onnx(traced, full, verify=False)
    options: dict[str, Any] = {"calibration": batches} if is_static else {}
    fxprune.export.to_onnx(traced, found, precision="int8", **options)
    weights = {"weight_type": QuantType.QInt8, "reduce_range": True}
    if is_static:
        model = onnx.load(full)
        feeds = [Session(full).feed(batch) for batch in batches]
        quantize_static(
            full, tmp_path / "own.onnx", _Batches(feeds), op_types_to_quantize=[*int8.STATIC], per_channel=True,
            nodes_to_exclude=[node.name for node in model.graph.node if node.op_type == "Add"],
            activation_type=QuantType.QUInt8, **weights,
        )  # fmt: skip
    else:
        quantize_dynamic(full, tmp_path / "own.onnx", **weights)
    expected, made = _parts(onnx.load(tmp_path / "own.onnx")), _parts(onnx.load(found))
    assert [*made[0]] == [*expected[0]]
    assert any(value.dtype == np.int8 and value.size > 4000 for value in made[0].values())
    for name, value in expected[0].items():
        own = made[0][name]
        assert (own.dtype, own.shape) == (value.dtype, value.shape), name
        if is_static and value.dtype == np.float32:  # ranges of activations: products round as weights are packed
            assert np.allclose(own, value, rtol=1e-6, atol=0), name
        elif value.dtype == np.int32:  # biases, by the steps of activations
            assert np.abs(own.astype(np.int64) - value).max() <= 1e-6 * np.abs(value).max() + 1, name
        else:
            assert own.tobytes() == value.tobytes(), name
    assert made[1] == expected[1]
    assert made[2] == expected[2]


@pytest.mark.parametrize("is_static", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_int8_files_are_made_one_weight_at_a_time(
    is_static: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, width = 24, 1024
    size, held = layers * width * width * 4, []

    def rewritten(draft: Any, change: Any) -> None:
        held.append(most_private(lambda: onnx_files.rewrite(draft, change)) / size)

    monkeypatch.setattr(exporting, "rewrite", rewritten)
    monkeypatch.setattr(onnx_files, "SINGLE_FILE_BYTES", 0)  # what is within a file, a session reads whole
    for own in (64, width, width):  # with the small one, what is loaded once
        modules = [nn.Linear(own, own, bias=bool(index % 2)) for index in range(layers)]
        traced = fxprune.trace(nn.Sequential(*modules), (torch.randn(2, own),), modes=("eval",))
        options: dict[str, Any] = {"calibration": [torch.randn(2, own)]} if is_static else {}
        report = fxprune.export.to_onnx(traced, tmp_path / "a.onnx", precision="int8", verify=False, **options)
    assert report.size < 0.26 * size
    assert min(held[1:]) < 0.45  # of 24 weights one, and what a quantizer makes while it works on it
