"""Small networks to repair: a layer whose outputs go, and the reader of them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import fxprune

SAMPLES = 40
HELD = torch.arange(SAMPLES) % 5 == 1


class Chain(nn.Module):
    """A layer whose outputs go, and the reader of them."""

    def __init__(self, first: nn.Module, reader: nn.Module) -> None:
        super().__init__()
        self.first, self.reader = first, reader

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(torch.tanh(self.first(x)))


def chain(reader: nn.Module, space: tuple[int, ...], channels: int) -> tuple[nn.Module, Tensor]:
    convolution = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(space)]
    first = convolution(3, channels, *([1] if space else []))
    model = Chain(first, reader).double().eval()
    return model, torch.randn(SAMPLES, 3, *space, dtype=torch.float64)


def masked(model: nn.Module, x: Tensor, *, rows: tuple[int, ...] = (1, 4)) -> fxprune.TracedModule:
    """The model, traced, without some outputs of its first layer."""
    traced = fxprune.trace(copy.deepcopy(model), (x[:2],), modes=("eval",))
    for name in ("first.weight", "first.bias"):
        mask = torch.ones_like(traced.get_parameter(name))
        mask[list(rows)] = 0
        fxprune.prune.custom_from_mask(traced, name, mask)
    return traced


def mlp(batches: int = SAMPLES) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Chain(nn.Linear(3, 6), nn.Linear(6, 4)).double().eval()
    return model, torch.randn(batches, 3, dtype=torch.float64)
