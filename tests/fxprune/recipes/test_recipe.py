"""What a recipe may say, and what is told of one that cannot be used."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fxprune import recipes
from fxprune.errors import ArgumentError

PLAIN: dict[str, Any] = {
    "model": {"source": "nets:trained"},
    "data": {"source": "digits.npz"},
    "choose": {"macs": 0.5},
}


def test_tables_of_a_file_are_a_recipe_with_defaults_for_what_they_leave_out(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('[model]\nsource = "nets:trained"\n[data]\nsource = "digits.npz"\n[choose]\nmacs = 0.5\n')
    recipe = recipes.read(path)
    assert recipe == recipes.parsed(PLAIN)
    assert recipe.choose.budgets == {"macs": 0.5}
    assert (recipe.choose.importance, recipe.repair.enabled, recipe.seed) == ("obs", True, 0)


@pytest.mark.parametrize(
    ("tables", "told"),
    [
        ({"chose": {}}, r"chose is unknown \(did you mean choose\?\)"),
        ({"choose": {"mac": 0.5}}, r"choose.mac is unknown \(did you mean macs\?\)"),
        ({"choose": {}}, r"choose: a budget is needed: macs, parameters, speedup or amount"),
        ({"model": {"source": "a:b", "zzz": 1}}, r"model.zzz is unknown \(known: source, weights, inputs\)"),
        ({"model": {}}, r"model.source is missing"),
        ({"choose": {"macs": 1.5}}, r"choose.macs: Input should be less than 1 \(given: 1.5\)"),
        ({"choose": {"speedup": 1}}, r"choose.speedup: Input should be greater than 1 \(given: 1\)"),
        ({"reparametrize": [{"kind": "norm", "names": "*"}]}, r"reparametrize.0.kind: Input should be 'weight_norm'"),
        ({"compare": {"data": {"sorce": "x"}}}, r"compare.data.sorce is unknown \(did you mean source\?\)"),
        ({"choose": {"macs": 0.5, "importance": "l2", "distance": "error"}}, r"distance is for importance .obs."),
        ({"export": {"onnx": False, "opset": 20}}, r"precision and opset are those of model.onnx"),
        ({"version": 2}, r"is of version 2; this fxprune reads version 1"),
        ({"data": None}, r"data is needed"),
    ],
)
def test_what_no_recipe_says_is_refused_with_its_place_and_the_nearest_name(tables: dict[str, Any], told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        recipes.parsed(PLAIN | tables)


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(ArgumentError) as raised:
        recipes.parsed({"model": {"source": "a:b"}, "choose": {"macs": 2.0}, "seed": -1, "extra": 0})
    assert all(name in str(raised.value) for name in ("choose.macs", "seed", "extra"))


@pytest.mark.parametrize(("content", "told"), [("macs = ", "no TOML"), (None, "No such file")])
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: str | None, told: str) -> None:
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ArgumentError, match=told):
        recipes.read(path)


def test_the_schema_describes_every_key() -> None:
    schema = recipes.schema()
    json.dumps(schema)
    tables = [schema, *schema["$defs"].values()]
    undescribed = [
        f"{table['title']}.{name}"
        for table in tables
        for name, key in table["properties"].items()
        if "description" not in key and not re.search("allOf|anyOf|[$]ref", str(key))
    ]
    assert undescribed == []
    assert all(table["additionalProperties"] is False for table in tables)


def test_the_page_has_every_key_and_the_published_schema_is_this_one() -> None:
    root = Path(recipes.__file__).parents[2]
    page = (root / "docs" / "command-line.md").read_text(encoding="utf-8")
    schema = recipes.schema()
    for table in ("Model", "Data", "Reparametrization", "Choose", "Repair", "Train", "Finalize", "Export", "Compare"):
        prefix = "reparametrize" if table == "Reparametrization" else table.lower()
        for name in schema["$defs"][table]["properties"]:
            assert f"| `{prefix}.{name}` |" in page or (table, name) == ("Compare", "data")
    assert json.loads((root / "docs" / "recipe.schema.json").read_text(encoding="utf-8")) == schema
