"""Every page in docs/: its python blocks run in order as printed, what it names exists, and it starts like a page."""

from __future__ import annotations

import inspect
import pkgutil
import re
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fxprune.channels.registry import REGISTRY
from tests.pages import ROOT, Block, blocks, sections, unknown_names

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))


@pytest.fixture
def _registrations_undone() -> Iterator[None]:
    before = dict(REGISTRY).keys()
    yield
    for operator in dict(REGISTRY).keys() - before:
        REGISTRY.remove(operator)


@every_page
@pytest.mark.usefixtures("_registrations_undone", "_torchvision_operators")
def test_the_blocks_of_a_page_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing := {lacking for block in blocks(page) if (lacking := block.lacks)}:
        pytest.skip(f"some blocks need {', '.join(sorted(missing))}")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*weight_norm.* is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", module="lightning")  # what a trainer says of its folders
        for block in blocks(page):
            block.run(namespace)


@every_page
def test_what_a_page_names_exists(page: Path) -> None:
    assert list(unknown_names(page)) == []


@every_page
def test_a_page_starts_with_a_title_and_whom_it_is_for(page: Path) -> None:
    title, empty, first, *_ = page.read_text(encoding="utf-8").splitlines()
    assert title.startswith("# ")
    assert empty == ""
    assert first.startswith("For "), first


def test_the_index_lists_every_page() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    names = [str(page.relative_to(DOCS)) for page in PAGES]
    assert [name for name in names if name != "README.md" and f"]({name})" not in index] == []


def test_the_picture_of_the_rooms_has_the_layers_that_imports_are_held_to() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    picture = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```")[1]
    left = [line[:40] for line in picture.splitlines()]  # the right column says what happens there
    assert re.findall(r"[a-z_]+", "\n".join(left)) == re.findall(r"[a-z_]+", "\n".join(layers))


def test_the_table_of_orders_has_the_signatures() -> None:
    page = (ROOT / "docs" / "interface.md").read_text(encoding="utf-8")
    rows = [row.strip("|").split("|") for row in sections(page)["Orders of arguments"].splitlines() if "|" in row][2:]
    assert len(rows) > 15
    for row in rows:
        calls, by_position, by_name = (re.findall(r"`([\w.]+)`", cell) for cell in row)
        for call in calls:
            parameters = inspect.signature(pkgutil.resolve_name(f"fxprune.{call}")).parameters.values()
            placed = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
            assert [p.name for p in parameters if p.kind in placed] == by_position, call
            named = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
            assert set(by_name) - {"amount"} <= named, call  # of a method, and of no other


def test_output_that_differs_from_what_is_printed_is_an_error() -> None:
    Block(ROOT / "README.md", 0, "print(1 + 1)\n", "2\n").run({})
    with pytest.raises(AssertionError):
        Block(ROOT / "README.md", 0, "print(1 + 1)\n", "3\n").run({})
