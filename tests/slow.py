"""Parameters of tests, some of which run in the slow suite alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow(names: Iterable[str], some: Collection[str]) -> list[Any]:
    """The names, some of them for the slow suite."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in some else name for name in names]
