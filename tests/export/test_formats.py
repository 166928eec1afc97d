"""Every format and precision for pruned public networks; the networks and the measure are the benchmark's."""

from __future__ import annotations

import runpy
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import fxprune
from fxprune.export import to_onnx

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


class Attention(nn.Module):
    """Attention with a bias, whose result torch lays out in more than one way."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, 4, 12, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x.view(x.shape[0], 12, 4, 8).transpose(1, 2)
        mask = self.bias.expand(x.shape[0], -1, -1, -1)
        y = nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        y = y.reshape(x.shape[0], -1, 12, 8).transpose(1, 2).contiguous()
        return y.reshape(x.shape[0], 12, -1)


def test_contiguous_after_attention(tmp_path: Path) -> None:
    traced = fxprune.trace(Attention(), torch.randn(2, 12, 32), modes=("eval",))
    assert to_onnx(traced, tmp_path / "m.onnx").comparison.ok  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "name",
    ["resnet20_cifar10", "densenet40_k12_cifar10", "mobilenet_wd4", "mobilenetv2_wd4", "shufflenetv2_wd2",
     "squeezenet_v1_1", "Bert", "DistilBert", "GPT2", "Llama", "ViT", "T5Encoder"],
)  # fmt: skip
def test_every_format(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytorchcv_model: Callable[..., nn.Module]
) -> None:
    # the benchmark's own module declares torchvision's operators, which the fixture has done
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setitem(sys.modules, "models", types.SimpleNamespace(cnn=pytorchcv_model))  # type: ignore[arg-type]
    rows = runpy.run_path(str(BENCHMARKS / "export_formats.py"))["measure"](name, tmp_path)
    limits = {"float16": 1e-2, "int8": 0.1}
    for label, size, error, own, note in rows:
        assert size, (label, note)
        assert not note, (label, note)
        limit = next((v for k, v in limits.items() if k in label), 1e-5)
        assert 0 < own < 1e-5
        assert 0 < error < limit, label
    assert len(rows) == 7
