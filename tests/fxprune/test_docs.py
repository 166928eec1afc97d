"""Every python block in docs/ runs as printed, and what its pages name exists."""

import re
import warnings
from pathlib import Path

import pytest
import torch

import fxprune

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCKS = [
    pytest.param(page, match[1], text.count("\n", 0, match.start(1)), id=f"{page.name}-{i}")
    for page in PAGES
    for text in [page.read_text(encoding="utf-8")]
    for i, match in enumerate(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
]


@pytest.mark.parametrize(("page", "source", "line"), BLOCKS)
def test_block_runs_as_printed(page, source, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*weight_norm.* is deprecated", category=FutureWarning)
        # the leading newlines make a traceback point at the page's own line
        exec(compile("\n" * line + source, str(page), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_and_files_of_a_page_exist(page):
    text = page.read_text(encoding="utf-8")
    for dotted in set(re.findall(r"`fxprune\.([\w.]+)", text)):
        found = fxprune
        for part in dotted.split("."):
            found = getattr(found, part)
    tests = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert set(re.findall(r"\btest_\w+\.py", text)) <= tests
