"""Headless Chromium; tests in this folder are skipped by name where it is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browsers import CHROMIUM, Watched, lacking

_PATIENCE = 120_000  # milliseconds: what is asked is whether a page does it, not how fast a busy machine is


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = lacking()
    if missing is not None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-quic", "--disable-sync"]
        )
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """Opens an address at a width and in a colour scheme; a page's own policy would stop axe-core."""
    contexts = []

    def open_(
        address: str, width: int = 1280, scheme: str = "light", bypass_csp: bool = True, **options: Any
    ) -> Watched:
        viewport = {"width": width, "height": 900}
        context = browser.new_context(viewport=viewport, color_scheme=scheme, bypass_csp=bypass_csp, **options)
        context.set_default_timeout(_PATIENCE)
        contexts.append(context)
        watched = Watched(context.new_page())
        watched.page.goto(address)
        return watched

    yield open_
    for context in contexts:
        context.close()
