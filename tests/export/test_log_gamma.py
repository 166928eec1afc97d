"""The logarithm of the gamma function is written to ONNX, as exact as torch's."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import fxprune


class LogGamma(nn.Module):
    """Of numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.lgamma(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_logarithm_of_gamma_is_that_of_float64_everywhere(dtype: torch.dtype, tmp_path: Path) -> None:
    traced = fxprune.trace(LogGamma().eval(), torch.rand(2, 3, dtype=dtype), modes=("eval",))
    fxprune.export.to_onnx(traced, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    eps = torch.finfo(dtype).eps
    numbers = [1.0, 1 + eps, 1 - eps, 2.0, 2 + 2 * eps, 2 - eps, 0.5, 1e-30, -1e-30, 1e30, 7.99, 8.0, 171.6, 1e6]
    numbers += [-0.5, -2.457024, -2.7476826, -30.3, -1000.25, *np.linspace(-9.9, 40, 500)]
    x = torch.tensor(numbers, dtype=dtype).view(-1, 3)
    (found,) = session.run(None, {"x": x.numpy()})
    wanted = torch.lgamma(x.double())
    np.testing.assert_allclose(found, wanted, rtol=2 * eps if dtype == torch.float32 else 1e-13, atol=4e-15)


def test_the_logarithm_of_gamma_is_infinite_where_torchs_is(tmp_path: Path) -> None:
    x = torch.tensor([0.0, -0.0, -1.0, -7.0, -1e20, math.inf, -math.inf, math.nan])[:, None]
    traced = fxprune.trace(LogGamma().eval(), x + 0.5, modes=("eval",))
    fxprune.export.to_onnx(traced, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    np.testing.assert_array_equal(session.run(None, {"x": x.numpy()})[0], torch.lgamma(x).numpy())


class OfWholeNumbers(nn.Module):
    """Of whole numbers, and as many as there are."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.lgamma(x) / x.numel()


def test_the_logarithm_of_gamma_of_whole_numbers_is_float32(tmp_path: Path) -> None:
    model = OfWholeNumbers().eval()
    traced = fxprune.trace(model, torch.arange(1, 7).view(2, 3), modes=("eval",))
    fxprune.export.to_onnx(traced, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    x = torch.arange(1, 13).view(4, 3)
    (found,) = session.run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, model(x).numpy(), rtol=2e-7, atol=4e-15)
