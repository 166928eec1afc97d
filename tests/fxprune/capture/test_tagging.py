"""Every reparametrization that a model carries is found in its graphs, and the tagged node has eager's value."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fxprune
from fxprune.graph.expressions import evaluate
from fxprune.graph.metadata import tag_of, tagged, tagged_names
from fxprune.graph.names import locate


class Doubled(nn.Module):
    """A parametrization of the user's own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Unchanged(nn.Module):
    """A parametrization that leaves no node."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Shared(nn.Module):
    """One masked layer under two names, called by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        prune.l1_unstructured(self.first, "weight", amount=4)
        self.second = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.second(x))


def _pruned() -> nn.Module:
    layer = nn.Linear(3, 3)
    prune.l1_unstructured(layer, "weight", amount=4)
    prune.random_unstructured(layer, "bias", amount=1)
    return layer


def _pruned_in_bfloat16() -> nn.Module:
    layer = nn.Linear(3, 3)
    prune.custom_from_mask(layer, "weight", torch.eye(3).bfloat16())
    return layer


def _masked_original() -> nn.Module:
    layer = nn.utils.weight_norm(nn.Linear(3, 3))
    hooks = dict(layer._forward_pre_hooks)
    layer._forward_pre_hooks.clear()
    prune.l1_unstructured(layer, "weight_v", amount=4)  # its hook runs first, so that it acts
    layer._forward_pre_hooks.update(hooks)
    return layer


def _masked_parametrization() -> nn.Module:
    layer = nn.Linear(3, 3)
    prune.l1_unstructured(layer, "weight", amount=4)
    parametrizations.weight_norm(layer, "weight_orig")
    return layer


LAYERS = {
    "masks": (_pruned, {"0.weight", "0.bias"}),
    "mask of another dtype": (_pruned_in_bfloat16, {"0.weight"}),
    "legacy weight norm": (lambda: nn.utils.weight_norm(nn.Linear(3, 3)), {"0.weight"}),
    "legacy spectral norm": (lambda: nn.utils.spectral_norm(nn.Linear(3, 3)), {"0.weight"}),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(3, 3)), {"0.weight"}),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(3, 3)), {"0.weight"}),
    "own": (lambda: parametrize.register_parametrization(nn.Linear(3, 3), "bias", Doubled()), {"0.bias"}),
    "no node": (lambda: parametrize.register_parametrization(nn.Linear(3, 3), "weight", Unchanged()), {"0.weight"}),
    "mask under a norm": (_masked_original, {"0.weight", "0.weight_v"}),
    "mask on a norm": (_masked_parametrization, {"0.weight", "0.weight_orig"}),
    "shared": (Shared, {"0.first.weight"}),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_tagged_nodes_have_eagers_values(kind: str) -> None:
    build, wanted = LAYERS[kind]
    model, x = nn.Sequential(build(), nn.Linear(3, 2)).eval(), torch.randn(4, 3)
    model(x)  # hooks compute what is read below
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = fxprune.trace(model, (x,))
    assert torch.equal(traced(x), model(x))
    for graph in traced.graphs.values():
        assert tagged_names(graph) == wanted
    for node in tagged(traced.graphs["eval"]):
        name = (tag_of(node) or {})["parameter"]
        owner, attribute = locate(model, name)
        assert torch.equal(evaluate(traced, node), getattr(owner, attribute)), name


def test_other_products_and_quotients_are_not_taken_for_hooks() -> None:
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight_orig = nn.Parameter(torch.ones(3))
            self.register_buffer("weight_mask", torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (self.weight_mask * self.weight_orig) / self.weight_orig

    traced = fxprune.trace(nn.Sequential(Scales(), _pruned()), (torch.randn(4, 3),))
    assert tagged_names(traced.graphs["eval"]) == {"1.weight", "1.bias"}
