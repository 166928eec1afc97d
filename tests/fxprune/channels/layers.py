"""Networks of a few layers, put together in a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Modules and the function that uses them."""

    def __init__(self, forward: Callable[..., Tensor], **modules: Any) -> None:
        super().__init__()
        self.call = forward
        for name, value in modules.items():
            setattr(self, name, value)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(self, *inputs)


def zero_rows(layer: Any, *rows: int, bias: bool = False) -> None:
    """Zero rows of a layer's weight, and of its bias where that is asked for."""
    with torch.no_grad():
        layer.weight[list(rows)] = 0
        if bias and layer.bias is not None:
            layer.bias[list(rows)] = 0


def norm(width: int) -> nn.BatchNorm2d:
    """A batch norm with random statistics; its shift is never zero."""
    layer = nn.BatchNorm2d(width)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5)
        layer.bias.copy_(torch.rand(width) + 0.2)
        assert layer.running_mean is not None and layer.running_var is not None  # noqa: PT018
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 1.5)
    return layer
