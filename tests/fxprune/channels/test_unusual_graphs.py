"""Graphs that draw random numbers in eval mode, branch, map, or have sizes that values decide, through `finalize`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune


class _Net(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.between(self.second(self.first(x).relu())))  # type: ignore[no-any-return]


class Branches(_Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x).relu())
        branched = torch.cond(x.sum() > 0, lambda v: self.third(v), lambda v: self.third(2 * v), (y,))
        return branched + y.sum()  # type: ignore[no-any-return]


class Selects(_Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[x[:, 0] > 0])


class Maps(_Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(super().forward)(x)


def _pruned(model: nn.Module, *names: str) -> fxprune.TracedModule:
    traced = fxprune.trace(model.double().eval(), torch.randn(4, 4).double())
    alive = (torch.arange(8) > 3).double()
    for name in names:
        fxprune.prune.custom_from_mask(
            traced, f"{name}.weight", alive[:, None].expand_as(model.get_submodule(name).weight)
        )
        fxprune.prune.custom_from_mask(traced, f"{name}.bias", alive)
    return traced


def _compare(traced: fxprune.TracedModule, final: fxprune.TracedModule) -> None:
    for count in (3, 5):
        x = torch.randn(count, 4).double()
        torch.manual_seed(0)
        expected = traced(x)
        torch.manual_seed(0)
        torch.testing.assert_close(final(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "between",
    [
        lambda x: F.dropout(x),
        lambda x: x * torch.randn_like(x),
        lambda x: x * torch.bernoulli(x.sigmoid()),
        lambda x: F.rrelu(x, training=True),
        lambda x: F.scaled_dot_product_attention(*[x[:, None]] * 3, dropout_p=0.5)[:, 0],
    ],
    ids=["dropout", "noise", "bernoulli", "rrelu", "attention"],
)
def test_what_draws_in_eval_mode_draws_the_same_and_the_rest_shrinks(between: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    traced = _pruned(_Net(between), "first", "second")
    generator = torch.get_rng_state()
    final = fxprune.finalize(traced, align=1)
    assert torch.equal(torch.get_rng_state(), generator)
    _compare(traced, final)
    assert final.get_parameter("first.weight").shape == (4, 4)
    assert final.get_parameter("second.weight").shape[0] == 8
    assert final.plan is not None
    assert "draws at random" in final.plan.explain()


@pytest.mark.parametrize("between", [lambda x: F.dropout(x, 0.0), lambda x: F.rrelu(x)], ids=["dropout", "rrelu"])
def test_what_could_draw_and_does_not_lets_channels_go(between: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    traced = _pruned(_Net(between), "first", "second")
    final = fxprune.finalize(traced, align=1)
    _compare(traced, final)
    assert final.get_parameter("second.weight").shape[1] == 4


@pytest.mark.parametrize("build", [Branches, Selects, Maps])
def test_branches_maps_and_sizes_that_values_decide(build: type[_Net]) -> None:
    torch.manual_seed(0)
    model = build().double().eval()
    traced = _pruned(model, "first")
    x = torch.randn(6, 4).double()
    with torch.no_grad():  # torch's own eager branches warn of gradients
        assert torch.equal(fxprune.trace(model, x)(x), model(x))
    final = fxprune.finalize(traced, align=1)
    _compare(traced, final)
    assert final.get_parameter("first.weight").shape == (4, 4)


class _OfSome(nn.Module):
    """Layers of the samples that are chosen, beside some of all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 3)
        self.inner, self.outer = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        chosen = torch.zeros_like(x[:, 0]) == 0
        added = torch.zeros_like(x)
        added[chosen] = self.outer(self.inner(x[chosen]).relu())
        return self.last(x + added)


def test_what_a_budget_tells_of_sizes_that_values_decide_is_what_finalize_leaves() -> None:
    torch.manual_seed(0)
    traced = fxprune.trace(_OfSome().eval(), torch.randn(3, 4), modes=("eval",))
    weights = sum(w.numel() for w in traced.parameters() if w.dim() == 2)
    report = fxprune.prune.channels(traced, macs=0.7, round_to=1)
    final = fxprune.finalize(traced)
    plan = final.plan
    assert plan is not None
    assert report.macs == plan.macs == (weights, sum(w.numel() for w in final.parameters() if w.dim() == 2))


class _StateSpace(nn.Module):
    """Two sequences that meet over their channels, and what comes of it over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.values = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 16)
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.einsum("bln,bsn->bls", self.first(x), self.second(x))
        return self.last(torch.einsum("bls,bsp->blp", weights, self.values(x)))


def test_what_a_budget_tells_of_a_contraction_of_one_channel_is_what_finalize_leaves() -> None:
    torch.manual_seed(0)
    traced = fxprune.trace(_StateSpace().eval(), torch.randn(2, 5, 6), modes=("eval",))
    report = fxprune.prune.channels(traced, 1.0, targets=("first", "second"), round_to=1)
    final = fxprune.finalize(traced)
    assert final.get_parameter("first.weight").shape == (1, 6)
    assert final.plan is not None
    layers = 5 * sum(w.numel() for w in final.parameters() if w.dim() == 2)
    assert report.macs[1] == final.plan.macs[1] == layers + 5 * 5 * 1 + 5 * 5 * 16
