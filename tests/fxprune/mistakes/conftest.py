"""One small model for all tests of mistakes: captured, to be changed, and finalized."""

from __future__ import annotations

import copy

import pytest

import fxprune
from tests.beginners import IMAGES, small


@pytest.fixture(scope="session")
def captured() -> fxprune.TracedModule:
    return fxprune.trace(small(), (IMAGES,))


@pytest.fixture
def traced(captured: fxprune.TracedModule) -> fxprune.TracedModule:
    return copy.deepcopy(captured)


@pytest.fixture(scope="session")
def finalized(captured: fxprune.TracedModule) -> fxprune.TracedModule:
    return fxprune.finalize(captured)
