"""The documentation site in a browser: pages of every kind are accessible, and fit the width."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.browsers import served
from tests.sites import built

# the last one has wide tables
PAGES = [
    ("index", 1280, "light"),
    ("index", 390, "dark"),
    ("start", 390, "light"),
    ("how-to/cnn", 390, "dark"),
    ("reference/prune", 1280, "dark"),
    ("trained", 1280, "light"),
    ("trained", 390, "dark"),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(built(tmp_path_factory.mktemp("documentation"))) as address:
        yield address


@pytest.mark.parametrize(("page", "width", "scheme"), PAGES)
def test_nothing_is_inaccessible_or_sticks_out(opened: Any, address: str, page: str, width: int, scheme: str) -> None:
    watched = opened(f"{address}{page}.html", width, scheme)
    assert watched.violations() == []
    assert watched.sticks_out() <= 0
    assert watched.complaints == []
    assert all(request.startswith((address, "data:", "blob:")) for request in watched.requests)
