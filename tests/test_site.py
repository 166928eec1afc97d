"""The documentation site: every page is in its navigation, every public name in its reference, and it builds alone."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import fxprune
from tests.pages import ROOT
from tests.sites import built

DOCS = ROOT / "docs"
MODULES = [
    "fxprune",
    *(f"fxprune.{name}" for name in ("prune", "channels", "passes", "export", "errors", "recipes", "callbacks")),
]
# modules that import a library of their own are read, not imported
ADAPTERS = [
    "fxprune.callbacks.lightning.FxpruneCallback",
    "fxprune.callbacks.transformers.FxpruneCallback",
    "fxprune.callbacks.accelerate.AcceleratedPruning",
]
ADDED = {"readme.md", "contributing.md", "changelog.md", "license.md"}  # by docs/site/pages.py


def public_names() -> Iterator[str]:
    """Every name of `__all__`, modules and the version aside; what the top names too stands there."""
    yield from ADAPTERS
    for name in [*MODULES, "fxprune.importance"]:
        module = fxprune.importance if name == "fxprune.importance" else importlib.import_module(name)
        for attribute in module.__all__:
            there = getattr(module, attribute)
            if attribute.startswith("__") or isinstance(there, ModuleType):
                continue
            top = getattr(fxprune, attribute, None) if attribute in fxprune.__all__ else None
            yield f"fxprune.{attribute}" if top is there else f"{name}.{attribute}"


def documented() -> list[str]:
    pages = sorted(DOCS.glob("reference/*.md"))
    return [name for page in pages for name in re.findall(r"^::: ([\w.]+)$", page.read_text("utf-8"), re.MULTILINE)]


def navigation() -> list[str]:
    text = (ROOT / "mkdocs.yml").read_text("utf-8").split("\nnav:\n")[1]
    return re.findall(r": ([\w./-]+\.md)$", text, re.MULTILINE)


def test_every_public_name_is_on_one_page_of_the_reference() -> None:
    names = documented()
    assert sorted(set(public_names()) - set(names)) == []
    assert sorted(set(names) - set(public_names())) == []
    assert len(names) == len(set(names))


def test_the_navigation_has_every_page_once() -> None:
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    pages |= {str(page.relative_to(DOCS).with_suffix(".md")) for page in DOCS.rglob("*.ipynb")}
    assert sorted(navigation()) == sorted(pages | ADDED)


def test_the_drawings_are_those_that_the_script_makes() -> None:
    script = importlib.util.spec_from_file_location("drawings", DOCS / "site" / "drawings.py")
    assert script is not None
    assert script.loader is not None
    drawings = sys.modules[script.name] = importlib.util.module_from_spec(script)  # where dataclasses look it up
    script.loader.exec_module(drawings)
    made = {f"{drawing.__name__}.svg": drawing().svg() for drawing in drawings.DRAWINGS}
    assert {path.name: path.read_text("utf-8") for path in DOCS.glob("drawings/*")} == made


@pytest.mark.parametrize("notebook", sorted(DOCS.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_prints_what_is_stored_in_it(
    notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for cell in json.loads(notebook.read_text("utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("".join(cell["source"]), str(notebook), "exec", dont_inherit=True), namespace)
            assert printed.getvalue() == "".join(line for output in cell["outputs"] for line in output["text"])


def test_there_are_two_notebooks() -> None:
    assert len([*DOCS.glob("notebooks/*.ipynb")]) == 2


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("built"))


def test_the_site_has_every_public_name(site: Path) -> None:
    identifiers = {
        name for page in site.glob("reference/*.html") for name in re.findall(r'id="([\w.]+)"', page.read_text("utf-8"))
    }
    assert sorted(set(public_names()) - identifiers) == []


def test_the_site_asks_no_other_host(site: Path) -> None:
    asked = re.compile(
        r"<(?:script|img|iframe|source|video)[^>]*\bsrc=[\"']?(?:https?:)?//[^\"' >]*"
        r"|<link[^>]*rel=[\"']?(?:stylesheet|preconnect|preload|icon)[^>]*href=[\"']?(?:https?:)?//[^\"' >]*"
        r"|url\([\"']?(?:https?:)?//[^)]*"
    )
    pages = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(pages) > 20
    assert [f"{page.name}: {match[0]}" for page in pages for match in asked.finditer(page.read_text("utf-8"))] == []
