"""A small network, captured once a file; each test gets a copy."""

from __future__ import annotations

import copy

import pytest
import torch

import fxprune
from tests.networks import Residual


@pytest.fixture(scope="module")
def captured() -> fxprune.TracedModule:
    torch.manual_seed(0)
    return fxprune.trace(Residual(), (torch.randn(2, 3, 6, 6),))


@pytest.fixture
def traced(captured: fxprune.TracedModule) -> fxprune.TracedModule:
    return copy.deepcopy(captured)
