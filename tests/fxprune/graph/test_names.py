"""Names: joined, looked up under every path of shared modules, matched by patterns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxprune.errors import NameLookupError
from fxprune.graph.names import ModulePaths, canonical, exists, join, match_names, names_of, one_name, tensors_of


class Shared(nn.Module):
    """One layer under two names, and one parameter in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, 2))
        self.decoder = self.encoder
        self.head = nn.Linear(2, 2)
        self.head.weight = self.encoder[0].weight
        self.register_buffer("scale", torch.ones(1))


@pytest.mark.parametrize(
    ("prefix", "name", "joined"),
    [("", "weight", "weight"), ("a.b", "weight", "a.b.weight"), ("a", "", "a"), ("", "", "")],
)
def test_paths_are_joined_without_stray_dots(prefix: str, name: str, joined: str) -> None:
    assert join(prefix, name) == joined


def test_a_shared_module_has_every_path_and_the_first_is_canonical() -> None:
    model = Shared()
    paths = ModulePaths(model)
    assert paths.of(model.encoder[0]) == names_of(model, model.encoder[0]) == ["encoder.0", "decoder.0"]
    assert paths.names("decoder.0.weight") == ["encoder.0.weight", "decoder.0.weight"]
    assert paths.canonical("decoder.0.bias") == canonical(model, "decoder.0.bias") == "encoder.0.bias"
    assert paths.canonical("scale") == "scale"  # at the root
    assert paths.of(nn.Linear(1, 1)) == []


def test_an_unknown_name_stays_as_it_is() -> None:
    assert canonical(Shared(), "nowhere.weight") == "nowhere.weight"
    assert not exists(Shared(), "nowhere.weight")
    assert not exists(Shared(), "head.gain")
    assert exists(Shared(), "decoder.0.weight")


def test_tensors_are_listed_under_every_name() -> None:
    model = Shared()
    found = tensors_of(model)
    assert set(found) == {
        "encoder.0.weight", "encoder.0.bias", "decoder.0.weight", "decoder.0.bias", "head.weight", "head.bias", "scale",
    }  # fmt: skip
    assert found["head.weight"] is found["decoder.0.weight"] is model.encoder[0].weight
    assert found["scale"] is model.scale


def test_patterns_match_and_near_names_are_told() -> None:
    names = ["a.weight", "a.bias", "b.weight"]
    assert match_names(names, "*.weight") == ["a.weight", "b.weight"]
    assert match_names([*names, "*.weight"], "*.weight") == ["*.weight"]  # an exact name comes before a pattern
    with pytest.raises(NameLookupError, match="2 names end or begin with it. Did you mean 'a.weight', 'b.weight'"):
        match_names(names, "weight")
    with pytest.raises(NameLookupError, match="no such name. Did you mean 'a.weight'"):
        match_names(names, "a.wieght")
    with pytest.raises(NameLookupError, match="it matches 2: a.weight, b.weight"):
        one_name(names, "*.weight")
    with pytest.raises(NameLookupError, match="got int"):
        match_names(names, 3)  # type: ignore[arg-type]
