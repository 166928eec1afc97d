"""Names on the axes of charts: short, and told apart."""

from __future__ import annotations

import pytest

from fxprune.recipes.charts import labels


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["net.a.conv.weight", "net.b.conv.weight"], ["a.conv", "b.conv"]),
        (["0.weight", "3.weight"], ["0", "3"]),
        (["a", "b.a"], ["a", "b.a"]),
        (["a.weight", "a"], ["a.weight", "a"]),
        (["conv.weight", "conv.weight"], ["conv", "conv #2"]),
        (["features.stage1.unit1.body.conv1.conv.weight"], ["conv1.conv"]),
        ([], []),
    ],
)
def test_labels_are_the_ends_that_tell_names_apart(names: list[str], wanted: list[str]) -> None:
    assert labels(names) == wanted


def test_long_labels_are_cut_and_still_differ() -> None:
    names = [f"blocks.a_rather_long_name_{i}_that_goes_on_and_on_{'x' * 30}.weight" for i in range(30)]
    found = labels(names)
    assert len(set(found)) == 30
    assert max(map(len, found)) <= 30
