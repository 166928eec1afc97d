"""A small network, samples and functions that recipes of the tests name."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def network() -> nn.Module:
    """Two convolutions and a classifier of 1 x 8 x 8 images."""
    torch.manual_seed(3)
    layers = (nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24 * 16, 5)).eval()


def images(count: int = 48) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def batches() -> list[Tensor]:
    return list(images().split(16))


def no_batches() -> list[Tensor]:
    return []


def train(traced: nn.Module) -> None:
    """A few steps whose batches are drawn from torch's generator."""
    optimizer = torch.optim.SGD(traced.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        traced(torch.randn(8, 1, 8, 8)).square().mean().backward()
        optimizer.step()


def score(module: nn.Module) -> float:
    with torch.no_grad():
        return float(module(images(8)).std())


def broken() -> nn.Module:
    raise RuntimeError("no weights at hand")


def text() -> str:
    return "no module"
