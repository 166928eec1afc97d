"""What mkdocs adds to the pages of docs/: the README, CONTRIBUTING and the changelog from above it, and notebooks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
# file of the root -> the page that it becomes
ABOVE = {
    "README.md": "readme.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "license.md",
}
_LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files above docs/, and a page for each notebook."""
    for name, page in ABOVE.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_LINK.sub(lambda match: _below(match[1]), text)))
    for notebook in sorted(Path(config.docs_dir).glob("notebooks/*.ipynb")):
        page = f"notebooks/{notebook.stem}.md"
        files.append(File.generated(config, page, content=notebook_text(json.loads(notebook.read_text("utf-8")))))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Let links that lead above docs/ lead to the pages that `on_files` has added; empty contents are not shown."""
    if "\n## " not in markdown and "\n::: " not in markdown:
        page.meta["hide"] = ["toc"]  # what has no headings has room for its tables
    depth = page.file.src_uri.count("/")
    for name, added in ABOVE.items():
        markdown = markdown.replace(f"]({'../' * (depth + 1)}{name}", f"]({'../' * depth}{added}")
    return markdown.replace(".ipynb)", ".md)")


def on_post_page(output: str, **_: Any) -> str:
    """Give a name to the search, and none to the empty corner of a table."""
    named = output.replace(
        'data-md-component="search" role="dialog"', 'data-md-component="search" role="dialog" aria-label="Search"'
    )
    return named.replace("<th></th>", "<td></td>")


def _below(target: str) -> str:
    """What a link of a file above docs/ leads to on the site."""
    return ABOVE.get(target, target.removeprefix("docs/"))


def notebook_text(notebook: dict[str, Any]) -> str:
    """A notebook as a page: texts, code, and below it what it printed or drew."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if picture := data.get("image/svg+xml"):
                parts.append("".join(picture))
            elif text := "".join(output.get("text", data.get("text/plain", []))):
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"
