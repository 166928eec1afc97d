"""Pages in headless Chromium: what they complain of, what they ask for, and what axe-core finds."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WIDTHS, SCHEMES = (1280, 768, 390), ("light", "dark")
CHROMIUM = os.environ.get("FXPRUNE_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


def lacking() -> str | None:
    """What is missing for tests in a browser, and how to get it."""
    for module in ("playwright", "axe_playwright_python"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed: pip install 'fxprune[browser]'"
    return None if CHROMIUM else "no Chromium is installed: apt-get install chromium"


def axe() -> str:
    """The script of axe-core."""
    found = importlib.util.find_spec("axe_playwright_python")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).with_name("axe.min.js").read_text(encoding="utf-8")


class Watched:
    """A page, what its console said, and what it asked the network for."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def violations(self) -> list[str]:
        """What axe-core finds wrong, each with the first element that it is found at."""
        script = axe() + "; axe.run(document, {resultTypes: ['violations']})"
        found = self.page.evaluate(script)["violations"]
        return [f"{each['id']}: {each['help']}: {each['nodes'][0]['html']}" for each in found]

    def sticks_out(self) -> int:
        """How many pixels of the page are beyond the right edge."""
        found: int = self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        return found


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which a folder is served on this machine alone."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
