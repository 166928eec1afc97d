"""Pages of text with code in them: their blocks, what these print, and whether what they name exists."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(
    r"(?:^<!-- needs (\w+) -->\n)?^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL
)
_FILE = re.compile(
    r"^(?:New file|At the end of|In) `([\w/.-]+)`(?:, below `([^`\n]+)`)?:\n\n```\w+\n(.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_PATH = re.compile(r"\b((?:fxprune|passes|export|tests|benchmarks|docs)/[\w./-]*[\w/])(?:::(\w+))?")
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")


@dataclass(frozen=True)
class Block:
    """A block of python.

    Attributes:
        page: the file it stands in. line: how many lines of the page come before it.
        source: its text. printed: the block of text right below it, which is what it prints; None without one.
        needs: the package without which it cannot run, from `<!-- needs package -->` right above it; None without one.
    """

    page: Path
    line: int
    source: str
    printed: str | None
    needs: str | None = None

    @property
    def lacks(self) -> str | None:
        """The package that it needs and that is not there."""
        return self.needs if self.needs and importlib.util.find_spec(self.needs) is None else None

    def run(self, namespace: dict[str, Any]) -> None:
        """Run it as printed, and compare what it prints."""
        output = io.StringIO()
        # the leading newlines make a traceback point at the page's own line
        code = compile("\n" * self.line + self.source, str(self.page), "exec", dont_inherit=True)
        with contextlib.redirect_stdout(output):
            exec(code, namespace)
        found = output.getvalue()
        if self.printed is not None and found.strip("\n") != self.printed.strip("\n"):
            raise AssertionError(f"{self.page.name}, the block after line {self.line} prints\n{found}")


@dataclass(frozen=True)
class FileBlock:
    """A block that goes into a file.

    Attributes:
        path: the file, as the page gives it: a new one, or one that is there.
        below: the line that it goes below; None for the end of the file.
        source: its text.
    """

    path: str
    below: str | None
    source: str

    def write(self, root: Path) -> None:
        """Do what the page says in the tree under `root`."""
        target = root / self.path
        before = target.read_text(encoding="utf-8") if target.exists() else ""
        if self.below is None:
            target.write_text(before + "\n\n" * bool(before) + self.source, encoding="utf-8")
        else:
            assert before.count(f"\n{self.below}\n") == 1, f"{self.path} has no single line {self.below!r}"
            target.write_text(before.replace(f"\n{self.below}\n", f"\n{self.below}\n{self.source}"), encoding="utf-8")


def blocks(page: Path) -> list[Block]:
    """The blocks of python in a page, those of whole files aside."""
    text = page.read_text(encoding="utf-8")
    files = {match.start(3) for match in _FILE.finditer(text)}
    found = [match for match in _BLOCK.finditer(text) if match.start(2) not in files]
    return [Block(page, text.count("\n", 0, match.start(2)), match[2], match[3], match[1]) for match in found]


def file_blocks(text: str) -> list[FileBlock]:
    """The blocks under "New file `path`:", "At the end of `path`:" and "In `path`, below `line`:"."""
    return [FileBlock(match[1], match[2], match[3]) for match in _FILE.finditer(text)]


def sections(text: str) -> dict[str, str]:
    """The sections of a page by their headings of the second level."""
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def unknown_names(page: Path) -> Iterator[str]:
    """What a page names and there is not: modules and functions of fxprune, files, tests in files, targets of links."""
    text = page.read_text(encoding="utf-8")
    written = {block.path for block in file_blocks(text)}
    for dotted in sorted(set(re.findall(r"`(fxprune(?:\.\w+)+)", text))):
        try:
            pkgutil.resolve_name(dotted)
        except (ImportError, AttributeError):
            yield dotted
    for path, test in sorted(set(_PATH.findall(re.sub(r"https?://[^\s)>]+", "", text)))):
        if path in written:
            continue
        if not (ROOT / path).exists():
            yield path
        elif test and f"def {test}(" not in (ROOT / path).read_text(encoding="utf-8"):
            yield f"{path}::{test}"
    tests = {path.name for path in (ROOT / "tests").rglob("test_*.py")} | {Path(path).name for path in written}
    yield from sorted(set(re.findall(r"\btest_\w+\.py", text)) - tests)
    yield from sorted({target for target in _LINK.findall(text) if not (page.parent / target).exists()})
