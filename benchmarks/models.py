"""Networks with random weights for the benchmarks."""

from __future__ import annotations

import torch
from torch import nn

# torchvision's import needs operators that its build lacks beside a CPU build of torch
_operators = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _operators.define(f"{_name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")


def cnn(name: str) -> nn.Module:
    """A pytorchcv network by its name."""
    from pytorchcv.model_provider import get_model

    torch.manual_seed(0)
    model: nn.Module = get_model(name)
    return model
