"""The README does what it says: every python block runs as printed, and the set-up commands are the ones CI runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.pages import ROOT, Block, blocks, unknown_names

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = blocks(README)
COMMANDS = [
    "pip install -c constraints.txt '.[demo]' && fxprune demo",
    "pip install -c constraints.txt -e '.[test]' && pytest",
]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"line{block.line + 1}")
def test_block_runs_as_printed(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    block.run({"__name__": "__main__"})


def test_first_screen_holds_the_commands_and_the_example() -> None:
    screen = "\n".join(TEXT.splitlines()[:48])
    assert all(f"```sh\n{command}\n```" in screen for command in COMMANDS)
    assert screen.count("```python\n") == 1


def test_ci_finds_one_test_command() -> None:
    assert re.findall(r"^pip install .* && pytest$", TEXT, re.MULTILINE) == [COMMANDS[1]]


def test_example_is_about_twenty_lines() -> None:
    assert len([line for line in BLOCKS[0].source.splitlines() if line.strip()]) <= 22


def test_what_it_names_and_links_to_exists() -> None:
    assert list(unknown_names(README)) == []
