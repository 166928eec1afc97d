"""Weights that forward computes from parameters are pruned as stored ones are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxprune
from tests.fxprune.channels.exactness import error

Computed = Callable[[Tensor, Tensor], Tensor]


def standardized(weight: Tensor, scale: Tensor) -> Tensor:
    """As the convolutions of BiT and NFNet compute theirs."""
    variance, mean = torch.var_mean(weight, dim=(1, 2, 3), keepdim=True, correction=0)
    return scale * (weight - mean) / torch.sqrt(variance + 1e-5)


# of a weight [16, 3, 3, 3] and a scale [16, 1, 1, 1]
WEIGHTS: dict[str, Computed] = {
    "hyperbolic tangent": lambda weight, scale: weight.tanh(),
    "twice": lambda weight, scale: 2 * weight,
    "scaled": lambda weight, scale: weight * scale,
    "centred": lambda weight, scale: weight - weight.mean((1, 2, 3), keepdim=True),
    "standardized": lambda weight, scale: weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5),
    "standardized at once": standardized,
    "rounded": lambda weight, scale: (8 * weight).round() / 8,
    # where the weight is masked it is one, but nothing reads the row
    "cosine": lambda weight, scale: weight.cos(),
}


class FirstLayer(nn.Module):
    def __init__(self, computed: Computed) -> None:
        super().__init__()
        self.computed = computed
        self.weight, self.bias = nn.Parameter(torch.randn(16, 3, 3, 3)), nn.Parameter(torch.randn(16))
        self.scale, self.last = nn.Parameter(torch.rand(16, 1, 1, 1) + 0.5), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.computed(self.weight, self.scale)
        return self.last(functional.conv2d(x, weight, self.bias, padding=1).relu())


class SecondLayer(nn.Module):
    def __init__(self, computed: Computed) -> None:
        super().__init__()
        self.computed = computed
        self.first, self.weight = nn.Conv2d(3, 16, 1), nn.Parameter(torch.randn(4, 16, 1, 1))
        self.scale = nn.Parameter(torch.rand(1, 16, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(self.first(x).relu(), self.computed(self.weight, self.scale))


def assert_half_goes(model: nn.Module, weight: str, axis: int) -> None:
    model = model.double().eval()
    traced = fxprune.trace(model, (torch.randn(2, 3, 6, 6).double(),))
    report = fxprune.prune.channels(traced, macs=0.5)
    final = fxprune.finalize(traced.eval())
    assert final.plan is not None
    assert len(final.plan.kept[weight][axis]) == 8, final.plan.explain()
    assert final.plan.macs == report.macs
    x = torch.randn(3, 3, 6, 6).double()
    with torch.no_grad():
        assert error(traced(x), final(x)) < 1e-9


@pytest.mark.parametrize("computed", WEIGHTS)
def test_rows_of_a_computed_weight_go(computed: str) -> None:
    assert_half_goes(FirstLayer(WEIGHTS[computed]), "weight", 0)


@pytest.mark.parametrize("computed", ["hyperbolic tangent", "twice", "scaled", "rounded"])
def test_columns_of_a_computed_weight_go(computed: str) -> None:
    assert_half_goes(SecondLayer(WEIGHTS[computed]), "weight", 1)


def test_constants_fold_into_the_bias_of_a_layer_whose_weight_is_computed() -> None:
    model = SecondLayer(WEIGHTS["scaled"]).double().eval()
    with torch.no_grad():
        model.first.weight[:8] = 0  # the biases stay
    traced = fxprune.trace(model, (torch.randn(2, 3, 6, 6).double(),), modes=("eval",))
    final = fxprune.finalize(traced, align=1)
    assert final.plan is not None
    assert len(final.plan.kept["first.weight"][0]) == 8
    x = torch.randn(3, 3, 6, 6).double()
    with torch.no_grad():
        assert error(model(x), final(x)) < 1e-9


def test_a_weight_that_depends_on_the_input_keeps_its_channels() -> None:
    model = SecondLayer(lambda weight, scale: weight * scale).double().eval()
    model.forward = lambda x: functional.conv2d(model.first(x), model.weight * x.mean())  # type: ignore[method-assign]
    with torch.no_grad():
        model.first.weight[:8] = 0
    traced = fxprune.trace(model, (torch.randn(2, 3, 6, 6).double(),), modes=("eval",), dynamic_shapes=None)
    final = fxprune.finalize(traced, align=1)
    assert final.plan is not None
    assert len(final.plan.kept["first.weight"][0]) == 16
    assert "depends on the input" in final.plan.explain()
