"""The layers that a report draws: which there are, what they read, and what is told of each."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import recipes
from fxprune.recipes.layers import lanes, picture, ranges
from fxprune.recipes.network import network
from fxprune.recipes.outcome import Outcome
from fxprune.recipes.page import page


class Residual(nn.Module):
    """A stem, two branches that are added, a concatenation with the stem, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.left = nn.Conv2d(8, 16, 3, padding=1)
        self.right = nn.ConvTranspose2d(8, 16, 3, padding=1)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.norm(self.stem(x)).relu()
        both = self.left(stem) + self.right(stem)
        whole = torch.cat([stem, both.view(both.shape[0], 16, 8, 8)], 1)
        result: Tensor = self.head(whole.mean((2, 3)))
        return result


def test_layers_read_what_they_compute_from() -> None:
    traced = fxprune.trace(Residual().eval(), torch.randn(2, 1, 8, 8))
    record = network(traced)
    names = [layer["name"] for layer in record["layers"]]
    assert names == ["x", "stem", "left", "right", "add", "cat", "head", "output"]
    reads = {layer["name"]: [names[place] for place in layer["reads"]] for layer in record["layers"]}
    assert reads == {
        "x": [], "stem": ["x"], "left": ["stem"], "right": ["stem"], "add": ["left", "right"], "cat": ["stem", "add"],
        "head": ["cat"], "output": ["head"],
    }  # fmt: skip
    assert record["shapes"] == {
        "stem.weight": [8, 1, 3, 3], "left.weight": [16, 8, 3, 3], "right.weight": [8, 16, 3, 3],
        "head.weight": [5, 24],
    }  # fmt: skip
    assert {layer["kind"] for layer in record["layers"]} >= {"input", "conv2d", "add", "cat", "linear", "output"}


def test_normed_weights_are_those_of_their_layer() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 3, 3)).eval()
    traced = fxprune.trace(model, torch.randn(2, 2, 9))
    fxprune.weight_norm(traced, "0.weight")
    layers = network(traced)["layers"]
    assert [(layer["kind"], layer["reads"]) for layer in layers] == [
        ("input", []), ("conv1d", [0]), ("conv1d", [1]), ("output", [2])
    ]  # fmt: skip


def outcome_of(model: nn.Module, inputs: Tensor, masked: dict[str, list[int]]) -> Outcome:
    """What a report is made from, after rows of weights were masked and taken out."""
    traced = fxprune.trace(model.eval(), inputs)
    record = network(traced)
    for name, rows in masked.items():
        mask = torch.ones_like(traced.get_parameter(name))
        mask[rows] = 0
        fxprune.prune.custom_from_mask(traced, name, mask)
    final = fxprune.finalize(traced, align=1)
    assert final.plan is not None
    stages: dict[str, dict[str, Any]] = {
        "trace": {"network": record, "seconds": 0.0},
        "finalize": {"plan": final.plan.to_dict(), "seconds": 0.0},
    }
    return Outcome({"model": {"source": "m:f"}}, {}, stages)


def test_rows_tell_widths_before_and_after_and_what_is_kept() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 3))
    drawn = picture(outcome_of(model, torch.randn(2, 1, 8, 8), {"0.weight": [1, 2, 7]}))
    assert drawn is not None
    first, second = drawn.rows[1:3]
    assert (first.width, second.width) == ((8, 5), (4, 4))
    assert (first.left, second.left) == (5 / 8, 5 / 8)
    assert first.tensors[0].kept == [(0, "0, 3-6")]
    assert second.tensors[0].kept == [(1, "0, 3-6")]
    assert second.tensors[0].picture is not None
    assert 'aria-label="4 of 4 rows and 5 of 8 columns are kept"' in second.tensors[0].picture
    assert (first.frame, second.frame) == (100.0, pytest.approx(100 * 0.5**0.5))


def test_widths_of_transposed_and_of_grouped_convolutions() -> None:
    model = nn.Sequential(
        nn.ConvTranspose2d(1, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4, bias=False), nn.ReLU(),
        nn.Conv2d(8, 3, 1),
    )  # fmt: skip
    outcome = outcome_of(model, torch.randn(2, 1, 8, 8), {"2.weight": [0, 1, 3, 5]})
    drawn = picture(outcome)
    assert drawn is not None
    widths = [row.width for row in drawn.rows]
    plan = outcome.stages["finalize"]["plan"]
    assert widths[2] == (8, len(plan["kept"]["2.weight"]["0"]))
    assert widths[1] == (8, 8 if plan["kept"]["0.weight"]["1"] is None else len(plan["kept"]["0.weight"]["1"]))
    assert "2.weight" in page(outcome)


class Tokens(nn.Module):
    """An embedding with positions added, a recurrent layer of 16 in both directions, a product and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.places = nn.Parameter(torch.randn(5, 8))
        self.states = nn.LSTM(8, 16, batch_first=True, bidirectional=True)
        self.mixed = nn.Parameter(torch.randn(32, 12))
        self.head = nn.Linear(12, 4)

    def forward(self, ids: Tensor) -> Tensor:
        states, _ = self.states(self.words(ids) + self.places)
        result: Tensor = self.head(states @ self.mixed)
        return result


def test_widths_are_those_of_what_a_layer_gives() -> None:
    drawn = picture(outcome_of(Tokens(), torch.zeros(2, 5, dtype=torch.int64), {}))
    assert drawn is not None
    widths = {row.name: row.width for row in drawn.rows if row.width}
    assert widths == {"words": (8, 8), "places": (8, 8), "states": (16, 16), "mixed": (12, 12), "head": (4, 4)}


def test_ranges_of_groups() -> None:
    assert ranges([[0, 1], [0, 1]]) == "0-1 of each group"
    assert ranges([[0], [1]]) == "group 0: 0; group 1: 1"


def connections(drawn: list[str]) -> list[list[int]]:
    """What each row reads, followed in the drawing alone."""
    found: list[list[int]] = []
    for row, markup in enumerate(drawn):
        sources = [row - 1] if "M8 0V20" in markup else []
        for start in re.findall(r"M(\d+) 0C", markup):
            above = row - 1
            while f'<line x1="{start}" x2="{start}" y1="0" ' in drawn[above]:
                above -= 1
            assert f'<line x1="{start}" x2="{start}" y1="36" ' in drawn[above]
            sources.append(above)
        found.append(sorted(sources))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_every_connection_can_be_followed_in_the_drawing(seed: int) -> None:
    draw = random.Random(seed)
    reads = [sorted({draw.randrange(max(0, row - 5), row) for _ in range(draw.randint(1, 3))}) for row in range(1, 40)]
    reads.insert(0, [])
    drawn, _ = lanes(reads)
    assert connections([str(each) for each in drawn]) == reads


def test_a_long_network_is_drawn_in_part_and_says_so() -> None:
    layers = [{"name": "input", "kind": "input", "reads": [], "weights": []}]
    layers += [{"name": f"add_{i}", "kind": "add", "reads": [i, 0], "weights": []} for i in range(1200)]
    stages = {"trace": {"network": {"layers": layers, "shapes": {}}, "seconds": 0.0}}
    outcome = Outcome({"model": {"source": "m:f"}}, {}, stages)
    drawn = picture(outcome)
    assert drawn is not None
    assert (len(drawn.rows), drawn.left_out) == (1000, 201)
    assert "201 more" in page(outcome)


def test_outcomes_without_a_record_have_no_picture() -> None:
    assert picture(Outcome({"model": {"source": "m:f"}}, {}, {"trace": {"seconds": 0.0}})) is None


def test_a_recipe_records_operators_and_layers(tmp_path: Any) -> None:
    tables: dict[str, Any] = {
        "model": {"source": "tests.recipe_networks:network"},
        "data": {"source": "tests.recipe_networks:batches"},
        "choose": {"macs": 0.5},
        "compare": {"rounds": 3},
    }
    outcome = recipes.run(recipes.parsed(tables), tmp_path)
    dense, pruned = outcome.stages["compare"]["operators"]
    assert dense["operators"]["Conv"]["nodes"] == pruned["operators"]["Conv"]["nodes"] == 2
    assert (dense["rounds"], sorted(tmp_path.iterdir())[0].name) == (3, "model.fxp")
    html = page(outcome)
    for text in ("Latency by operator", "Conv", 'id="l1"', "there is no first node that differs"):
        assert text in html
    drawn = picture(outcome)
    assert drawn is not None
    told = {what for row in drawn.rows for what, _ in row.notes}
    assert {"stayed", "error, relative", "group 0.weight (channel)"} <= told
