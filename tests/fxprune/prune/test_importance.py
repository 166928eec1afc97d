"""Entry scores: definitions, gradients against eager autograd, and what the loader or the loss can lack."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune

import fxprune
from fxprune.errors import ArgumentError, FxpruneError, PruningError
from fxprune.prune.importance import IMPORTANCES, SCORES, Evidence, register, scores
from fxprune.prune.importance import value as value_of
from fxprune.prune.importance_registry import Score
from tests.networks import Residual

NAMES = ["stem.weight", "inner.weight", "head.weight"]


@pytest.fixture
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(4, 3, 6, 6), torch.randint(5, (4,))) for _ in range(4)]


def test_magnitudes_and_draws(traced: fxprune.TracedModule) -> None:
    fxprune.prune.random_unstructured(traced, "inner.weight", 0.5)
    state = traced.state_dict()
    effective = {n: state[n] if n in state else state[f"{n}_orig"] * state[f"{n}_mask"] for n in NAMES}
    for name, value in scores(traced, NAMES).items():
        assert torch.equal(value, effective[name].abs())
    for name, value in scores(traced, NAMES, "l2").items():
        assert torch.equal(value, effective[name].square())
    first, second = scores(traced, NAMES, "random", seed=3), scores(traced, NAMES, "random", seed=3)
    assert all(torch.equal(first[name], second[name]) for name in NAMES)
    assert not torch.equal(first["stem.weight"], scores(traced, NAMES, "random")["stem.weight"])
    assert ((first["inner.weight"] == 0) == (effective["inner.weight"] == 0)).all()


@pytest.mark.parametrize("count", [None, 1, 3])
def test_taylor_is_the_mean_of_weight_times_gradient_of_eager(
    batches: list[tuple[torch.Tensor, torch.Tensor]], count: int | None
) -> None:
    model = Residual().double()
    batches = [(x.double(), y) for x, y in batches]
    traced = fxprune.trace(copy.deepcopy(model), (batches[0][0],))
    prune.l1_unstructured(model.inner, "weight", 0.4)
    fxprune.prune.l1_unstructured(traced, "inner.weight", 0.4)
    want = dict.fromkeys(NAMES, 0.0)
    model.eval()
    for x, y in batches[:count]:
        model.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        for name in NAMES:
            module = model.get_submodule(name.split(".")[0])
            parameter = module.weight_orig if name.startswith("inner") else module.weight
            want[name] = want[name] + (parameter * parameter.grad).abs().detach() / len(batches[:count])
    got = scores(traced, NAMES, "taylor", loader=batches, loss=functional.cross_entropy, max_batches=count)
    assert all(torch.allclose(got[name], want[name], rtol=1e-9, atol=1e-15) for name in NAMES)
    assert list(got) == NAMES


def test_taylor_is_the_change_of_the_loss_for_a_linear_model() -> None:
    traced = fxprune.trace(nn.Linear(4, 1).double(), (torch.randn(2, 4).double(),))
    x = torch.randn(6, 4).double()
    got = scores(traced, "weight", "taylor", loader=[(x, None)], loss=lambda out, _: out.mean())
    full = traced(x).mean()
    for i in range(4):
        other = copy.deepcopy(traced)
        with torch.no_grad():
            other.get_parameter("weight")[0, i] = 0
        assert float((other(x).mean() - full).detach().abs()) == pytest.approx(float(got["weight"][0, i]), rel=1e-9)


@pytest.mark.parametrize("modes", [("train", "eval"), ("train",)])
def test_taylor_leaves_no_trace(batches: list[Any], modes: Any) -> None:
    traced = fxprune.trace(Residual(), (batches[0][0],), modes=modes)
    traced.train()
    traced(batches[0][0]).sum().backward()
    before = {key: value.clone() for key, value in traced.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in traced.named_parameters()}
    random = torch.get_rng_state()
    with torch.no_grad():
        scores(traced, NAMES, "taylor", loader=batches, loss=functional.cross_entropy)
    assert traced.training
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in traced.state_dict().items())
    assert all(torch.equal(gradients[name], p.grad) for name, p in traced.named_parameters())


def test_batches_may_be_mappings_or_hold_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.a(x) * y

    x, y, t = torch.randn(4, 3), torch.randn(4, 2), torch.randn(4, 2)
    traced = fxprune.trace(Two(), (x, y))
    loss = functional.mse_loss
    want = scores(traced, "a.weight", "taylor", loader=[((x, y), t)], loss=loss)["a.weight"]
    for batch, function in (
        (({"x": x, "y": y}, t), loss),
        ({"x": x, "y": y}, lambda out, batch: loss(out, t * (batch["x"] is x))),
    ):
        got = scores(traced, "a.weight", "taylor", loader=[batch], loss=function)["a.weight"]
        assert torch.equal(want, got)


def test_scores_serve_local_and_global_selection(traced: fxprune.TracedModule, batches: list[Any]) -> None:
    given = scores(traced, NAMES, "taylor", loader=batches, loss=functional.cross_entropy)
    threshold = torch.cat([s.reshape(-1) for s in given.values()]).sort().values[500]
    fxprune.prune.global_unstructured(traced, given, prune.L1Unstructured, given, amount=500)
    for name in NAMES:
        assert torch.equal(traced.get_buffer(f"{name}_mask") == 0, given[name] < threshold)


def test_a_function_is_a_score_and_the_registry_is_open(traced: fxprune.TracedModule) -> None:
    def depth(traced: fxprune.TracedModule, names: Any, evidence: Evidence) -> dict[str, torch.Tensor]:
        return {name: torch.full_like(traced.get_parameter(name), i) for i, name in enumerate(names)}

    assert scores(traced, NAMES, depth)["inner.weight"].unique().tolist() == [1]
    SCORES["depth"] = depth
    try:
        assert scores(traced, "head.weight", "depth")["head.weight"].unique().tolist() == [0]
    finally:
        del SCORES["depth"]
    with pytest.raises(ArgumentError, match="depth"):
        scores(traced, "head.weight", "depth")


@pytest.fixture
def closeness() -> Iterator[Score]:
    """A registered importance: entries far from 1 matter most."""

    @register("closeness")
    def closeness(traced: fxprune.TracedModule, names: Any, evidence: Evidence) -> dict[str, torch.Tensor]:
        return {name: (value_of(traced, name) - 1).abs() for name in names}

    yield closeness
    del SCORES["closeness"]


def test_a_registered_importance_scores_entries_and_channels(closeness: Score) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    traced = fxprune.trace(model, (torch.randn(2, 3),), modes=("eval",))
    found = scores(traced, "*.weight", "closeness")
    assert torch.equal(found["0.weight"], (model[0].weight - 1).abs())
    units = found["0.weight"].double().sum(1) + found["2.weight"].double().sum(0)
    fxprune.prune.channels(traced, 3, importance="closeness")
    gone = (traced.get_buffer("0.bias_mask") == 0).nonzero().flatten()
    assert sorted(gone.tolist()) == sorted(units.argsort()[:3].tolist())


@pytest.mark.parametrize("name", ["l1", "linf", "closeness"])
def test_a_taken_name_is_refused_and_keeps_its_meaning(
    traced: fxprune.TracedModule, closeness: Score, name: str
) -> None:
    before = IMPORTANCES[name]
    with pytest.raises(ArgumentError, match=f"{name!r} is registered already"):
        register(name)(lambda traced, names, evidence: {})
    with pytest.raises(ArgumentError, match=f"{name!r} is registered already"):
        SCORES[name] = lambda traced, names, evidence: {}
    assert IMPORTANCES[name] is before


def test_what_scores_channels_alone_scores_no_entries(traced: fxprune.TracedModule) -> None:
    assert "fpgm" in IMPORTANCES
    assert "fpgm" not in SCORES
    with pytest.raises(ArgumentError, match="one of l1, l2, random, taylor is needed"):
        scores(traced, NAMES, "fpgm")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"importance": "hessian"}, "l1, l2, random, taylor"),
        ({"importance": ["l1"]}, "l1, l2, random, taylor"),
        ({"names": "*.gain"}, "gain"),
        ({"names": []}, "no names"),
        ({"loader": None}, "loader=None"),
        ({"loss": None}, "loss=None"),
        ({"loader": []}, "yielded 0 batches"),
        ({"loader": iter(())}, "yielded 0 batches"),
        ({"max_batches": 9}, "yielded 4 batches; 9"),
        ({"max_batches": 0}, "max_batches=0"),
        ({"loader": [torch.randn(4, 3, 6, 6)]}, "Tensor; a pair"),
        ({"loss": lambda out, y: out}, "no scalar"),
        ({"loss": lambda out, y: 1.0}, "no scalar"),
        ({"loss": lambda out, y: out.detach().sum()}, "no gradient to stem.weight, inner.weight, head.weight"),
        ({"loss": lambda out, y: out.sum() * float("nan")}, "NaN"),
        ({"importance": lambda t, n, e: None}, "NoneType"),
        ({"importance": lambda t, n, e: {"stem.weight": torch.ones(1)}}, "gave keys stem.weight"),
        ({"importance": lambda t, n, e: dict.fromkeys(n, torch.ones(2))}, r"\(8, 3, 3, 3\)"),
    ],
)
def test_what_is_missing_is_named(
    traced: fxprune.TracedModule, batches: list[Any], change: dict[str, Any], match: str
) -> None:
    arguments = {
        "names": NAMES, "importance": "taylor", "loader": batches, "loss": functional.cross_entropy,
    }  # fmt: skip
    with pytest.raises(FxpruneError, match=match):
        scores(traced, **arguments | change)


def test_frozen_and_unused_parameters_have_no_gradient(traced: fxprune.TracedModule, batches: list[Any]) -> None:
    traced.get_parameter("stem.weight").requires_grad_(False)
    with pytest.raises(PruningError, match="no gradient to stem.weight. Unfreeze"):
        scores(traced, NAMES, "taylor", loader=batches, loss=functional.cross_entropy)


def test_an_unknown_importance_is_also_a_value_error(traced: fxprune.TracedModule) -> None:
    with pytest.raises(ArgumentError):
        scores(traced, NAMES, "")
