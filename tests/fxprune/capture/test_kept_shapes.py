"""Modules that keep the shape of the last call, and what they made for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fxprune


class Detect(nn.Module):
    """Adds points of a grid, made anew where the shape of the input is another than in the last call."""

    shape: torch.Size | None = None

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 4, 1)
        self.points = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        if self.shape != x.shape:
            self.points = torch.arange(x.shape[-1], dtype=x.dtype) + 0.5
            self.shape = x.shape
        return torch.add(self.layer(x), self.points)


def test_a_model_that_has_run_is_captured_with_a_free_batch() -> None:
    model, x = Detect().eval(), torch.randn(2, 2, 3, 5)
    model(x)
    points = model.points
    traced = fxprune.trace(model, x, modes=("eval",))  # a warning is an error
    assert model.shape == x.shape
    assert model.points is points
    for batch in (2, 4):
        x = torch.randn(batch, 2, 3, 5)
        assert torch.equal(traced(x), model(x))
