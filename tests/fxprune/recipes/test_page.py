"""The page of a report: what it says, that it is safe with any names, and that it needs nothing else."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fxprune import recipes
from fxprune.recipes import page as page_
from fxprune.recipes.outcome import Outcome
from fxprune.recipes.page import page, ranges

HOSTILE = '<script>alert("x")</script>&\'"</td>'


class Parsed(HTMLParser):
    """The tags, the attributes and the text of a page, checked to be nested."""

    VOID = ("meta", "br", "wbr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._open = "", list[str]()
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    tables: dict[str, Any] = {
        "model": {"source": "tests.recipe_networks:network"},
        "data": {"source": "tests.recipe_networks:batches"},
        "choose": {"macs": 0.5},
        "compare": {"latency": False, "score": "tests.recipe_networks:score"},
    }
    folder = tmp_path_factory.mktemp("page")
    found = recipes.run(recipes.parsed(tables), folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == page(found)
    return found


def test_the_page_says_what_is_left_and_which_indices_are_kept(outcome: Outcome) -> None:
    told = Parsed(page(outcome)).text
    assert outcome.macs is not None
    for text in (f"{outcome.macs[0]:,}", f"{outcome.macs[1]:,}", "0.weight", "3.weight", "model.safetensors"):
        assert text in told
    kept = outcome.stages["finalize"]["plan"]["kept"]["3.weight"]
    assert any(index is not None and f"axis {axis}: {ranges(index)}" in told for axis, index in kept.items())
    reason = next(iter(outcome.stages["choose"]["channels"]["stayed"].values()))
    assert reason in told


def test_it_needs_no_network_and_no_script(outcome: Outcome) -> None:
    parsed = Parsed(page(outcome))
    names = {tag for tag, _ in parsed.tags}
    assert names & {"script", "link", "img", "iframe", "object"} == set()
    sources = [value for _, attributes in parsed.tags for name, value in attributes.items() if name in ("src", "href")]
    assert [source for source in sources if source and not source.startswith("#")] == []
    assert "url(" not in page(outcome)


def test_tables_have_captions_and_heads_and_charts_have_descriptions(outcome: Outcome) -> None:
    pytest.importorskip("vl_convert")
    parsed = Parsed(page(outcome))
    count = {
        tag: sum(found == tag for found, _ in parsed.tags) for tag in ("table", "caption", "thead", "h1", "figure")
    }
    assert count["table"] == count["caption"] == count["thead"] > 5
    assert (count["h1"], count["figure"]) == (1, 3)
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in parsed.tags if tag == "th")
    assert all(attributes.get("aria-label") for tag, attributes in parsed.tags if tag == "figure")


def test_without_the_renderer_of_charts_the_tables_say_the_same(
    outcome: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_, "can_draw", lambda: False)
    parsed = Parsed(page(outcome))
    assert "figure" not in {tag for tag, _ in parsed.tags}
    assert "pip install 'fxprune[report]'" in parsed.text
    assert "All readers as a table" in parsed.text


def renamed(value: Any, name: str) -> Any:
    """All texts and keys of a record made hostile, but for the keys that are its own."""
    if isinstance(value, dict):
        return {key.replace("3.weight", name): renamed(each, name) for key, each in value.items()}
    if isinstance(value, list):
        return [renamed(each, name) for each in value]
    return value.replace("3.weight", name) if isinstance(value, str) else value


def test_names_that_are_markup_are_text(outcome: Outcome) -> None:
    record = renamed(outcome.to_dict(), HOSTILE)
    record["failure"] = HOSTILE
    html = page(Outcome(**record))
    parsed = Parsed(html)
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert HOSTILE in parsed.text
    assert "<script" not in html


def test_ten_thousand_layers_are_one_page_of_four_megabytes() -> None:
    kept = {f"layers.{i}.weight": {"0": list(range(0, 64, 2))} for i in range(10_000)}
    plan = {"kept": kept, "shapes": {name: [64, 3] for name in kept}, "stayed": []}
    html = page(Outcome({"model": {"source": "m:f"}}, {}, {"finalize": {"plan": plan, "seconds": 0.0}}))
    assert "layers.9999.weight" in html
    assert len(html.encode()) < 4_000_000


def test_a_budget_out_of_reach_is_the_first_thing_said(tmp_path: Path) -> None:
    tables: dict[str, Any] = {
        "model": {"source": "tests.recipe_networks:network", "inputs": ["2x1x8x8"]},
        "choose": {"macs": 0.0001, "importance": "l2"},
        "repair": {"enabled": False},
    }
    recipes.run(recipes.parsed(tables), tmp_path)
    told = Parsed((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert re.search(r"The budget was not reached\.\s+macs=0.0001 cannot be reached", told)


def test_charts_without_anything_to_see_are_left_out() -> None:
    curve = {"name": "a.weight", "kind": "channel", "size": 4, "counts": [2, 4], "measured": [0.0, 1e-12]}
    readers = {"a.weight": {"before": 0.0, "after": 0.0, "note": ""}}
    budgets = [{"macs": 0.5, "loss": 0.0, "chosen": True}]
    stages = {
        "choose": {"sensitivity": {"curves": [curve]}, "budgets": budgets, "seconds": 0.0},
        "repair": {"repair": {"readers": readers}, "seconds": 0.0},
    }
    parsed = Parsed(page(Outcome({"model": {"source": "m:f"}}, {}, stages)))
    assert "figure" not in {tag for tag, _ in parsed.tags}
    assert "All readers as a table" in parsed.text


def test_ranges_are_written_short() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges([]) == ""
    assert ranges(range(0, 2000, 2)).endswith("798, ...")
