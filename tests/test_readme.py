"""The README does what it says: every python block runs as printed, and the set-up commands are the ones CI runs."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = [
    pytest.param(match[1], TEXT.count("\n", 0, match.start(1)), id=f"line{TEXT.count(chr(10), 0, match.start(1)) + 1}")
    for match in re.finditer(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
]
COMMANDS = [
    "pip install -c constraints.txt '.[demo]' && fxprune demo",
    "pip install -c constraints.txt -e '.[test]' && pytest",
]


@pytest.mark.parametrize(("source", "line"), BLOCKS)
def test_block_runs_as_printed(source, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    # The leading newlines make a traceback point at the README's own line.
    exec(compile("\n" * line + source, str(README), "exec"), {"__name__": "__main__"})


def test_first_screen_holds_the_commands_and_the_example():
    screen = "\n".join(TEXT.splitlines()[:48])
    assert all(f"```sh\n{command}\n```" in screen for command in COMMANDS)
    assert screen.count("```python\n") == 1


def test_ci_finds_one_test_command():
    assert re.findall(r"^pip install .* && pytest$", TEXT, re.MULTILINE) == [COMMANDS[1]]


def test_example_is_about_twenty_lines():
    assert len([line for line in BLOCKS[0].values[0].splitlines() if line.strip()]) <= 22


def test_links_resolve():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT)
    assert targets
    assert [target for target in targets if not (README.parent / target).exists()] == []
