"""Pages in headless Chromium, with all that it complains of, and axe-core."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright, of the extra `browser`, is not installed")
CHROMIUM = os.environ.get("FXPRUNE_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
WIDTHS, SCHEMES = (1280, 768, 390), ("light", "dark")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if CHROMIUM is None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="no Chromium is installed: apt-get install chromium"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Watched:
    """A page, what its console said, and what it asked the network for."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def violations(self, axe: str) -> list[str]:
        """What axe-core finds wrong, each with the first element that it is found at."""
        found = self.page.evaluate(axe + "; axe.run(document, {resultTypes: ['violations']})")["violations"]
        return [f"{each['id']}: {each['help']}: {each['nodes'][0]['html']}" for each in found]

    def sticks_out(self) -> int:
        """How many pixels of the page are beyond the right edge."""
        found: int = self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        return found


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """Opens an address at a width and in a colour scheme."""
    contexts = []

    def open_(address: str, width: int = 1280, scheme: str = "light", **options: Any) -> Watched:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, **({"bypass_csp": True} | options)
        )
        contexts.append(context)
        watched = Watched(context.new_page())
        watched.page.goto(address)
        return watched

    yield open_
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def axe() -> str:
    """The script of axe-core."""
    found = importlib.util.find_spec("axe_playwright_python")
    if found is None or found.origin is None:
        pytest.skip("axe-core, of the extra `browser`, is not installed")
    return Path(found.origin).with_name("axe.min.js").read_text(encoding="utf-8")
