"""Models that carry a torch.nn.utils system before they are traced compute what eager computes, and fold exactly."""

import pytest
import torch
from torch.nn.utils import spectral_norm, weight_norm

from fxprune.graph.names import locate
from tests.systems import CARRIED_ONLY, LAYERS, MASKS, NORMS, X, assert_follows_eager, mlp

SYSTEMS = {**{k: v[0] for k, v in {**MASKS, **NORMS}.items()}, **CARRIED_ONLY}
VECTORS = ("bias", "layer norm", "batch norm")
# every system on a linear layer, every layer under one of each kind
ROWS = [("linear", system) for system in SYSTEMS] + [
    (layer, system)
    for layer in LAYERS
    for system in (
        ("l1", "random", "weight norm", "legacy weight norm", "spectral norm")
        if layer in VECTORS
        else ("container of three", "legacy weight norm", "legacy spectral norm", "spectral norm", "orthogonal")
    )
    if layer != "linear" and (layer, system) != ("encoder layer", "orthogonal")
]


@pytest.mark.parametrize(("layer", "system"), ROWS)
def test_carried_system_follows_eager(layer, system):
    plain, args, name = LAYERS[layer]

    def touch(model):
        SYSTEMS[system](*locate(model, name))

    free = layer == "linear" or system == "container of three"
    assert_follows_eager(plain, touch, args, dynamic_shapes="batch" if free else None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("system", ["container of three", "legacy weight norm", "weight norm", "weight norm, dim -1",
                                    "legacy spectral norm", "spectral norm"])  # fmt: skip
def test_carried_system_follows_eager_in_each_dtype(system, dtype):
    assert_follows_eager(lambda: mlp().to(dtype), lambda m: SYSTEMS[system](m[0], "weight"), (X[0].to(dtype),))


@pytest.mark.parametrize("system", ["l1", "weight norm", "legacy weight norm", "spectral norm", "legacy spectral norm"])
def test_frozen_parameter_stays_as_frozen_as_in_eager(system):
    def plain():
        model = mlp()
        model[0].weight.requires_grad_(False)
        return model

    assert_follows_eager(plain, lambda m: SYSTEMS[system](m[0], "weight"), X)


def test_one_frozen_half_of_a_weight_norm_stays_frozen():
    assert_follows_eager(mlp, lambda m: weight_norm(m[0]).weight_g.requires_grad_(False), X)


def test_weight_norm_and_spectral_norm_of_two_parameters_of_one_module():
    assert_follows_eager(mlp, lambda m: spectral_norm(weight_norm(m[0], "weight"), "bias"), X)
