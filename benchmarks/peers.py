"""Torch-Pruning's pruner, for the benchmarks."""

from __future__ import annotations

from typing import Any

import torch_pruning
from torch import nn


def classifiers(model: nn.Module) -> list[nn.Module]:
    """The layers that give the 1000 classes, which no pruner may cut."""
    return [m for m in model.modules() if getattr(m, "out_features", getattr(m, "out_channels", 0)) == 1000]


def magnitude_pruner(
    model: nn.Module, x: Any, ratio: float, ignored: list[nn.Module], **options: Any
) -> torch_pruning.pruner.BasePruner:
    """Torch-Pruning's pruner by the L2 norm."""
    importance = torch_pruning.importance.MagnitudeImportance(p=2)
    return torch_pruning.pruner.MagnitudePruner(
        model, x, importance=importance, pruning_ratio=ratio, ignored_layers=ignored, **options
    )
