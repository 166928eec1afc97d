"""No budget is estimated to lose less than a larger one, whose choice may be that of the smaller."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import fxprune
from fxprune.graph.sharing_copies import sharing_copy
from tests.budget_networks import network

SHARES = (0.9, 0.6, 0.4, 0.3, 0.25, 0.2)


def _digits() -> tuple[nn.Module, torch.Tensor]:
    """A network of two convolutions, trained for a second; and images."""
    torch.manual_seed(0)
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16
    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(1024, 10)),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for batch in torch.randint(1200, (100, 32)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    return model.eval(), images[:256]


def _random(family: str) -> tuple[nn.Module, torch.Tensor]:
    model, inputs = network(family, 16)
    return model, torch.randn(64, *inputs.shape[1:])


def _lost(sensitivity: fxprune.Sensitivity, removed: dict[str, tuple[int, int]]) -> float:
    by_name = {f"{curve.name} ({curve.kind})": curve.losses() for curve in sensitivity.curves}
    return sum(float(by_name[group][count]) for group, (count, _) in removed.items())


@pytest.mark.parametrize("family", ["digits", "branches", pytest.param("depthwise", marks=pytest.mark.slow)])
def test_no_budget_is_estimated_to_lose_less_than_a_larger_one(family: str) -> None:
    model, samples = _digits() if family == "digits" else _random(family)
    traced = fxprune.trace(model, samples[:2], modes=("eval",))
    sensitivity = fxprune.sensitivity(traced, list(samples.split(32)))
    losses, unit = [], max(group.macs for group in fxprune.channel_groups(traced))
    for share in SHARES:
        report: Any = fxprune.prune.channels(sharing_copy(traced), macs=share, importance=sensitivity)
        dense, left = report.macs
        assert left <= share * dense < max(left / 0.98, left + unit)
        losses.append(_lost(sensitivity, report.removed))
    assert losses == sorted(losses)
    assert losses[0] < losses[-1]
