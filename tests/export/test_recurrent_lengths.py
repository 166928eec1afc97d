"""Recurrent layers run over any length, in the graph and in the file, as one operator a layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fxprune

LAYERS: list[tuple[type[nn.RNNBase], str, dict[str, Any]]] = [
    (nn.LSTM, "LSTM", {"bidirectional": True, "batch_first": True}),
    (nn.LSTM, "LSTM", {"num_layers": 2, "bias": False}),
    (nn.LSTM, "LSTM", {"proj_size": 5, "batch_first": True}),
    (nn.GRU, "GRU", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    (nn.GRU, "GRU", {"bias": False}),
    (nn.RNN, "RNN", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    (nn.RNN, "RNN", {"nonlinearity": "relu", "bias": False}),
    (nn.RNN, "RNN", {"nonlinearity": "relu", "bidirectional": True}),
]


class Recognizer(nn.Module):
    """Columns of an image, halved, through a recurrent layer; sizes are read from what that gives."""

    def __init__(self, kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.batch_first = bool(options.get("batch_first"))
        self.images = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.layer = kind(16, 8, **options)
        self.head = nn.Linear(options.get("proj_size", 8) * (2 if options.get("bidirectional") else 1), 5)

    def forward(self, x: Tensor) -> Tensor:
        columns = self.images(x).permute(0, 3, 1, 2).flatten(2)
        states, _ = self.layer(columns if self.batch_first else columns.transpose(0, 1))
        return self.head(states).reshape(states.shape[0] * states.shape[1], 5)


def free_width() -> dict[str, dict[int, Any]]:
    return {"x": {0: Dim.AUTO, 3: Dim.AUTO}}


@pytest.mark.parametrize(("kind", "operator", "options"), LAYERS, ids=str)
def test_recurrent_layers_run_over_other_lengths_than_the_sample(
    kind: type[nn.RNNBase], operator: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = Recognizer(kind, options).eval()
    x = torch.randn(2, 1, 8, 20)
    traced = fxprune.trace(model, (x,), dynamic_shapes=free_width(), modes=("eval",))
    fxprune.prune.channels(traced, 0.25)
    final = fxprune.finalize(traced)
    report = fxprune.export.to_onnx(final, tmp_path / "model.onnx")
    assert not any("captured once more" in note for note in report.notes)
    operators = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert operators.count(operator) == options.get("num_layers", 1)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for batch, width in ((3, 40), (1, 21), (2, 6)):
        images = torch.randn(batch, 1, 8, width)
        with torch.no_grad():
            masked, small = traced(images), final(images)
        np.testing.assert_allclose(small, masked, atol=2e-6)
        np.testing.assert_allclose(session.run(None, {"x": images.numpy()})[0], masked, atol=2e-6)


def test_both_graphs_equal_eager_at_other_lengths_bit_for_bit() -> None:
    model = Recognizer(nn.LSTM, {"batch_first": True, "num_layers": 2})
    x = torch.randn(2, 1, 8, 20)
    traced = fxprune.trace(model, (x,), dynamic_shapes=free_width())
    for images in (torch.randn(3, 1, 8, 40), torch.randn(2, 1, 8, 7)):
        for mode in (True, False):
            assert torch.equal(traced.train(mode)(images), model.train(mode)(images))
