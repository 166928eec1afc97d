"""Networks with random weights, and what they cost, for the benchmarks."""

from __future__ import annotations

import torch
from command import declare_torchvision
from torch import nn

from fxprune.graph.macs import counted_macs, flop_counter


def cnn(name: str) -> nn.Module:
    """A pytorchcv network by its name."""
    declare_torchvision()
    from pytorchcv.model_provider import get_model

    torch.manual_seed(0)
    model: nn.Module = get_model(name)
    return model


def vision(name: str) -> nn.Module:
    """A network for 224 x 224 images: "vit_b", or a pytorchcv network by its name."""
    if name != "vit_b":
        return cnn(name)
    declare_torchvision()
    from transformers import ViTConfig, ViTForImageClassification

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.vit = ViTForImageClassification(ViTConfig(num_labels=1000))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.vit(x).logits
            return logits

    return Logits()


def sample(batch: int) -> torch.Tensor:
    """Random images."""
    return torch.randn(batch, 3, 224, 224)


def macs(model: nn.Module, x: torch.Tensor | dict[str, torch.Tensor]) -> float:
    """Multiply-accumulates by torch's formulas, for one input or several by name."""
    # the fused kernels of recurrent layers have no formula
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), flop_counter() as counter:
        model(**x) if isinstance(x, dict) else model(x)
    return float(counted_macs(counter))
