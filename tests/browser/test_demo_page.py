"""The page on which the digits networks run in the browser, against onnxruntime on the same files."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.browsers import SCHEMES, WIDTHS, Watched, served
from tests.web_digits import PAGE, images, logits, recorded, right

RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page with onnxruntime-web beside it: as it was fetched before, else by npm."""
    folder = tmp_path_factory.mktemp("demo")
    shutil.copytree(PAGE, folder, dirs_exist_ok=True)
    if not all((folder / "ort" / name).is_file() for name in RUNTIME):
        command = [sys.executable, str(PAGE / "fetch.py"), str(folder / "ort")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
        if done.returncode:
            pytest.skip(f"onnxruntime-web cannot be fetched: {done.stderr.strip()}")
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with served(folder) as address:
        yield address


def started(opened: Any, address: str, *arguments: Any, **options: Any) -> Watched:
    watched: Watched = opened(f"{address}digits.html", *arguments, **options)
    watched.page.wait_for_selector("html[data-ready=yes]", timeout=120_000)
    return watched


@pytest.fixture(scope="module")
def digits() -> dict[str, Any]:
    return recorded()


def test_the_networks_classify_in_the_browser_as_onnxruntime_does(
    opened: Any, address: str, digits: dict[str, Any]
) -> None:
    watched = started(opened, address, bypass_csp=False)
    page = watched.page
    for name in ("dense", "pruned"):
        wanted = torch.from_numpy(logits(name, images(digits)[:1])).softmax(1)[0].tolist()
        told = [float(page.inner_text(f"#{name}-share-{digit}")) for digit in range(10)]
        assert told == pytest.approx(wanted, abs=1e-3)
    assert f"It is a {digits['labels'][0]}." in page.inner_text("#verdict")
    page.get_by_role("button", name="Run all test images").click()
    page.wait_for_function("document.getElementById('pruned-right').textContent.includes(' of ')")
    assert page.inner_text("#dense-right") == f"{right('dense', digits)} of 599"
    assert page.inner_text("#pruned-right") == f"{right('pruned', digits)} of 599"
    assert watched.complaints == []
    assert {request.startswith(address) for request in watched.requests} == {True}


def test_times_of_both_are_shown(opened: Any, address: str) -> None:
    page = started(opened, address).page
    told = r"A run takes the pruned network \d+\.\d\d of the time of the dense one\."
    assert re.fullmatch(told, page.inner_text("#status"))  # how much depends on what else the machine does
    assert all(float(page.inner_text(f"#{name}-time").removesuffix(" ms")) > 0 for name in ("dense", "pruned"))


def test_a_sample_is_chosen_by_a_click(opened: Any, address: str) -> None:
    page = started(opened, address).page
    for digit in (3, 7):
        page.get_by_role("button", name=f"Sample of a {digit}").click()
        page.wait_for_function(f"document.getElementById('verdict').textContent.includes('It is a {digit}.')")
        assert page.inner_text("#dense-digit") == str(digit)


def test_a_digit_is_drawn_by_the_mouse(opened: Any, address: str) -> None:
    page = started(opened, address).page
    page.get_by_role("button", name="Clear").click()
    assert page.inner_text("#dense-digit") == ""
    box = page.locator("#pad").bounding_box()
    corners = [(0.3, 0.2), (0.7, 0.2), (0.45, 0.85)]  # a seven
    page.mouse.move(box["x"] + corners[0][0] * box["width"], box["y"] + corners[0][1] * box["height"])
    page.mouse.down()
    for x, y in corners[1:]:
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=8)
    page.mouse.up()
    page.wait_for_function("document.getElementById('pruned-digit').textContent !== ''")
    assert (page.inner_text("#dense-digit"), page.inner_text("#pruned-digit")) == ("7", "7")


def test_a_digit_is_drawn_by_the_keyboard(opened: Any, address: str) -> None:
    page = started(opened, address).page
    page.locator("#pad").focus()
    page.keyboard.press("Delete")
    page.keyboard.press("Space")
    assert page.inner_text("#pen") == "Row 8, column 12, pen down."
    for _ in range(8):
        page.keyboard.press("ArrowDown")
    assert page.inner_text("#pen") == "Row 24, column 12, pen down."
    page.wait_for_function("document.getElementById('dense-digit').textContent === '1'")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_inaccessible_or_sticks_out(opened: Any, address: str, width: int, scheme: str) -> None:
    watched = started(opened, address, width, scheme)
    assert watched.violations() == []
    assert watched.sticks_out() <= 0


def test_without_the_runtime_the_page_says_what_is_missing(opened: Any, tmp_path: Path) -> None:
    for name in ("digits.html", "digits.js", "digits.json"):
        shutil.copy(PAGE / name, tmp_path)
    with served(tmp_path) as address:
        page = opened(f"{address}digits.html").page
        page.wait_for_function("document.getElementById('status').textContent.includes('fetch.py')")
