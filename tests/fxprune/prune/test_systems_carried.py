"""Models that carry a torch.nn.utils system before they are traced compute what eager computes, and fold exactly."""

import pytest
import torch
from torch.nn.utils import spectral_norm, weight_norm

from fxprune.graph.names import locate
from tests.systems import CARRIED_ONLY, FREE, LAYERS, MASKS, NORMS, Parallel, X, assert_follows_eager, mlp, rows

SYSTEMS = {**{k: v[0] for k, v in {**MASKS, **NORMS}.items()}, **CARRIED_ONLY}
VECTORS = ("bias", "layer norm", "batch norm")
# every layer under a system of each kind
ROWS = [
    (layer, system)
    for layer in LAYERS
    for system in (
        ("l1", "random", "weight norm", "legacy weight norm", "spectral norm")
        if layer in VECTORS
        else ("container of three", "legacy weight norm", "legacy spectral norm", "spectral norm", "orthogonal")
    )
    if (layer, system) != ("encoder layer", "orthogonal")
]


@pytest.mark.parametrize(("layer", "system"), rows(ROWS))
def test_carried_system_follows_eager(layer, system):
    plain, args, name = LAYERS[layer]

    def touch(model):
        SYSTEMS[system](*locate(model, name))

    assert_follows_eager(plain, touch, args, dynamic_shapes="batch" if layer in FREE else None)


def assert_all_follow_eager(systems, dtype=torch.float32, prepare=lambda model: None):
    """One model with a linear layer for each of the systems."""

    def plain():
        model = Parallel(len(systems), dtype)
        prepare(model)
        return model

    def touch(model):
        for layer, system in zip(model.layers, systems, strict=True):
            SYSTEMS[system](layer, "weight")

    assert_follows_eager(plain, touch, (X[0].to(dtype),))


@pytest.mark.parametrize("systems", [MASKS, NORMS, CARRIED_ONLY], ids=["masks", "norms", "carried only"])
def test_every_carried_system_follows_eager_beside_others(systems):
    assert_all_follow_eager(list(systems))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
def test_carried_systems_follow_eager_in_each_dtype(dtype):
    assert_all_follow_eager(
        ["container of three", "legacy weight norm", "weight norm", "weight norm, dim -1", "legacy spectral norm",
         "spectral norm"], dtype)  # fmt: skip


def test_frozen_parameters_stay_as_frozen_as_in_eager():
    systems = ["l1", "weight norm", "legacy weight norm", "spectral norm", "legacy spectral norm"]
    assert_all_follow_eager(systems, prepare=lambda m: [layer.weight.requires_grad_(False) for layer in m.layers])


def test_one_frozen_half_of_a_weight_norm_stays_frozen():
    assert_follows_eager(mlp, lambda m: weight_norm(m[0]).weight_g.requires_grad_(False), X)


def test_weight_norm_and_spectral_norm_of_two_parameters_of_one_module():
    assert_follows_eager(mlp, lambda m: spectral_norm(weight_norm(m[0], "weight"), "bias"), X)
