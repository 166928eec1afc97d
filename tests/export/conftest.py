"""What the tests of exports share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def _shared(shared_translations: None) -> None:
    """Every file here exports to ONNX."""
