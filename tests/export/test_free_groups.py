"""Convolutions whose weights differ from sample to sample are written for any batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fxprune


class Conditional(nn.Module):
    """Weights mixed of three for each sample, and all samples in one call, as groups; 2 groups in a sample."""

    def __init__(self, kernel: tuple[int, ...], bias: bool, **options: int) -> None:
        super().__init__()
        self.kernel, self.options = kernel, options
        self.first = nn.Conv2d(3, 4, 1) if len(kernel) == 2 else nn.Conv1d(3, 4, 1)
        self.choice = nn.Linear(4, 3)
        self.weights = nn.Parameter(torch.randn(3, 6, 2, *kernel))
        self.bias = nn.Parameter(torch.randn(3, 6)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        batch, channels, *places = x.shape
        shares = self.choice(x.flatten(2).mean(2)).sigmoid()
        weights = torch.einsum("be,eoi->boi", shares, self.weights.flatten(2)).reshape(6 * batch, 2, *self.kernel)
        bias = None if self.bias is None else (shares @ self.bias).flatten()
        convolve: Any = torch.conv2d if len(self.kernel) == 2 else torch.conv1d
        x = convolve(x.reshape(1, batch * channels, *places), weights, bias, groups=2 * batch, **self.options)
        return x.view(batch, 6, *x.shape[2:])


CASES = [
    ((3, 2), True, {"stride": 2, "padding": 1}, {}),
    ((3,), False, {"padding": 4, "dilation": 2}, {}),
    ((1, 1), True, {}, {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}),
]


@pytest.mark.parametrize(("kernel", "bias", "options", "free"), CASES)
def test_groups_that_follow_the_batch_are_written_for_any_batch(
    kernel: tuple[int, ...], bias: bool, options: dict[str, int], free: dict[int, Any], tmp_path: Path
) -> None:
    model = Conditional(kernel, bias, **options).eval()
    sizes = (3, 9, 8) if len(kernel) == 2 else (3, 9)
    traced = fxprune.trace(
        model, (torch.randn(2, *sizes),), dynamic_shapes=({0: Dim.DYNAMIC, **free},), modes=("eval",)
    )
    fxprune.export.to_onnx(traced, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        x = torch.randn(batch, *(size + 2 * (place in free) for place, size in enumerate(sizes, 1)))
        (found,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)
