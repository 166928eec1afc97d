"""Configured models within a user's own module: each says its sizes, or is named where it cannot."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import ConfigurationWarning
from fxprune.graph.configurations import Configuration
from tests.fxprune.artifacts.test_configurations import IDS, Model, Numbers


class Pooled(Model):
    """Has a layer more where it is built from its configuration alone, as models of transformers have a pooler."""

    def __init__(self, config: Numbers, pooled: bool = True) -> None:
        super().__init__(config)
        if pooled:
            self.pooler = nn.Linear(config.width, config.width)


class Both(nn.Module):
    """Two models of a library, and layers of the user's that read what they give."""

    def __init__(self, one: Numbers, other: Numbers) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({"one": Model(one), "other": Pooled(other, pooled=False)})
        self.inner, self.last = nn.Linear(10, 24), nn.Linear(24, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.cat([encoder(ids) for encoder in self.encoders.values()], -1)
        return self.last(self.inner(x).relu())


def written(model: nn.Module, masked: dict[str, int]) -> tuple[nn.Module, Tensor]:
    """The model without so many of the first rows of some weights, and what it should compute."""
    traced = fxprune.trace(model, IDS, modes=("eval",))
    for name, count in masked.items():
        mask = torch.ones_like(traced.get_parameter(name))
        mask[:count] = 0
        fxprune.prune.custom_from_mask(traced, name, mask)
        bias = name.replace("weight", "bias")
        fxprune.prune.custom_from_mask(traced, bias, mask[:, 0])
    final = fxprune.finalize(traced)
    return fxprune.write_back(final, model), final(IDS)


def layers(path: str, count: int) -> dict[str, int]:
    """As many units of each hidden layer of a model."""
    return {f"{path}.layers.{i}.up.weight": count for i in range(3)}


def test_what_is_chosen_for_a_module_that_holds_configured_ones_comes_back_into_each() -> None:
    model = Both(Numbers(inner=40), Numbers(inner=56)).eval()
    traced = fxprune.trace(model, IDS, modes=("eval",))
    report = fxprune.prune.channels(traced, macs=0.6, runnable=model)
    final = fxprune.finalize(traced)
    small = fxprune.write_back(final, model)
    assert report.macs[1] <= 0.6 * report.macs[0]
    assert small.inner.out_features < 24
    for encoder in small.encoders.values():
        again = type(encoder)(copy.deepcopy(encoder.config))
        assert not again.load_state_dict(encoder.state_dict(), strict=False).unexpected_keys
        encoder.forward = again.eval().forward
    torch.testing.assert_close(small(IDS), final(IDS))
    sizes = {name: encoder.config.inner for name, encoder in small.encoders.items()}
    assert sizes["one"] < 40 or sizes["other"] < 56
    assert model.encoders["one"].config.inner == 40


def test_sizes_that_a_configuration_within_says_follow_also_where_nobody_asked() -> None:
    model = Both(Numbers(inner=40), Numbers()).eval()
    small, wanted = written(model, layers("encoders.one", 8) | {"inner.weight": 2})
    assert small.encoders["one"].config.inner == 32
    assert small.encoders["other"].config.inner is None
    torch.testing.assert_close(small(IDS), wanted)


def test_a_width_for_each_layer_of_a_model_within_is_warned_of_with_its_place() -> None:
    model = Both(Numbers(inner=40), Numbers(inner=40)).eval()
    with pytest.warns(ConfigurationWarning, match=r"sizes of this Pooled \(encoders.other\): inner gives"):
        small, wanted = written(model, layers("encoders.one", 8) | {"encoders.other.layers.0.up.weight": 8})
    assert [encoder.config.inner for encoder in small.encoders.values()] == [32, 40]
    torch.testing.assert_close(small(IDS), wanted)


def test_models_that_share_a_configuration_and_have_other_sizes_are_warned_of() -> None:
    shared = Numbers(inner=40)
    model = Both(shared, shared).eval()
    with pytest.warns(ConfigurationWarning, match="another module of other sizes has the same one"):
        small, wanted = written(model, layers("encoders.one", 8) | layers("encoders.other", 10))
    torch.testing.assert_close(small(IDS), wanted)


def test_the_outermost_modules_with_a_configuration_count() -> None:
    model = Both(Numbers(), Numbers())
    assert [found.path for found in Configuration.all_of(model)] == ["encoders.one", "encoders.other"]
    assert [found.path for found in Configuration.all_of(model.encoders["one"])] == [""]
