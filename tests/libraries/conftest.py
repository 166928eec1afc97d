"""What tests of diffusers share."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch import nn

import fxprune


@pytest.fixture
def diffusers(_torchvision_operators: object) -> Any:
    """The diffusers package."""
    return pytest.importorskip("diffusers")


def settled(model: nn.Module) -> Any:
    """A model in eval mode of which nothing is zero at the start."""
    for parameter in model.parameters():
        if parameter.abs().max() < 1e-3:
            nn.init.normal_(parameter, 0, 0.1)
    return model.eval()


def with_masks(traced: fxprune.TracedModule, model: nn.Module) -> Any:
    """The dense model with zeros where the masks are."""
    masked, buffers = copy.deepcopy(model), dict(traced.named_buffers())
    for name, parameter in masked.named_parameters():
        if f"{name}_mask" in buffers:
            parameter.data = parameter.data * buffers[f"{name}_mask"]
    return masked
