"""CONTRIBUTING does what it says: walk-throughs work as printed, in a copy of the tree, and what it names exists."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.pages import ROOT, FileBlock, file_blocks, sections, unknown_names

PAGE = ROOT / "CONTRIBUTING.md"
WALKS = {
    heading: file_blocks(body)
    for heading, body in sections(PAGE.read_text(encoding="utf-8")).items()
    if heading.startswith("Add ")
}
# the tests of the walk-throughs, by words of their names
ADDED = {
    "tests/fxprune/channels/test_operators.py": "rot90",
    "tests/passes/test_drop_dropout.py": "dropout_that_is_off",
    "tests/fxprune/prune/test_spread.py": "entries_are_the_same",
}


def is_test(block: FileBlock) -> bool:
    return block.path.startswith("tests/")


def follow(walk: list[FileBlock], root: Path) -> Path:
    """A copy of the source tree with the blocks of a walk-through in it."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "*venv", "benchmarks", "docs")
    shutil.copytree(ROOT, root, symlinks=True, ignore=ignored)
    for block in walk:
        block.write(root)
    return root


def run_added_tests(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    return subprocess.run(
        [*command, *ADDED, "-k", " or ".join(ADDED.values())],
        cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_there_are_three_walk_throughs_each_in_one_file_of_few_lines() -> None:
    assert list(WALKS) == ["Add an operator rule", "Add a pass", "Add an importance"]
    for walk in WALKS.values():
        (code,) = [block for block in walk if not is_test(block)]
        assert len([line for line in code.source.splitlines() if line.strip()]) < 30
        assert [block for block in walk if is_test(block)]


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return follow([block for walk in WALKS.values() for block in walk], tmp_path_factory.mktemp("followed") / "tree")


def test_the_tests_of_the_walk_throughs_pass(followed: Path) -> None:
    found = run_added_tests(followed)
    assert found.returncode == 0, found.stdout
    assert re.search(r"^3 passed", found.stdout, re.MULTILINE), found.stdout


@pytest.mark.slow
def test_the_test_of_each_walk_through_fails_without_its_code(tmp_path: Path) -> None:
    blocks = [block for walk in WALKS.values() for block in walk]
    found = run_added_tests(follow([block for block in blocks if is_test(block)], tmp_path / "tree"))
    lost = re.findall(r"^(?:FAILED|ERROR) ([\w/]+\.py)", found.stdout, re.MULTILINE)
    assert sorted(lost) == sorted(ADDED), found.stdout


def test_the_commands_of_the_walk_throughs_run_these_tests() -> None:
    commands = re.findall(r"^`pytest -n0 ([\w/.]+)[^`]*` runs it", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert commands == list(ADDED)


def test_the_blocks_are_formatted_and_lint_clean(followed: Path) -> None:
    files = sorted({block.path for walk in WALKS.values() for block in walk if block.path.endswith(".py")})
    ruff = Path(sysconfig.get_path("scripts"), "ruff")
    for command in (["check", "-q"], ["format", "--check", "-q", "--diff"]):
        found = subprocess.run(
            [ruff, *command, "--no-cache", *files], cwd=followed, capture_output=True, text=True, check=False
        )
        assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.slow
@pytest.mark.parametrize("tool", [["mypy", "--cache-dir", os.devnull], ["lint-imports", "--no-cache"]])
def test_types_and_import_rules_hold_with_the_blocks(followed: Path, tool: list[str]) -> None:
    command = [Path(sysconfig.get_path("scripts"), tool[0]), *tool[1:]]
    found = subprocess.run(command, cwd=followed, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def test_what_it_names_and_links_to_exists() -> None:
    assert list(unknown_names(PAGE)) == []


def test_every_room_is_in_the_table() -> None:
    rooms = sections(PAGE.read_text(encoding="utf-8"))["Rooms"]
    folders = {path.name for path in (ROOT / "fxprune").iterdir() if (path / "__init__.py").exists()}
    told = set(re.findall(r"^\| `(?:fxprune/)?(\w+)/`", rooms, re.MULTILINE))
    assert folders <= told


def test_where_to_start_reading_is_defined_there() -> None:
    rooms = sections(PAGE.read_text(encoding="utf-8"))["Rooms"]
    told = re.findall(r"`(\w+)` in `([\w/]+\.py)`", rooms)
    assert len(told) >= 9
    for name, path in told:
        assert re.search(rf"^(def|class) {name}\b", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), path


def test_the_hooks_have_the_linter_of_the_tests() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    pinned = re.search(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None
    assert f"rev: v{pinned[1]}\n" in hooks
