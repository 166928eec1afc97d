"""Sensitivity where something says nothing, is too large, in half precision, or cut into pieces in another way."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxprune
from fxprune.channels.groups import Grouping
from fxprune.errors import ArgumentError
from fxprune.prune.sensitivity.readings import readings
from tests.attention_spellings import attention


def mlp(*sizes: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double().eval(), torch.randn(60, sizes[0], dtype=torch.float64)


def measured(model: nn.Module, x: Tensor, **options: Any) -> fxprune.Sensitivity:
    return fxprune.sensitivity(fxprune.trace(copy.deepcopy(model), (x[:2],), modes=("eval",)), x, **options)


def test_the_units_that_go_are_the_first_of_the_order_whose_loss_was_measured() -> None:
    model, x = mlp(8, 64, 64, 4)
    sensitivity = measured(model, x)
    for curve in sensitivity.curves:
        assert np.argsort(curve.slopes(), kind="stable").tolist() == list(curve.order)
    traced = fxprune.trace(copy.deepcopy(model), (x[:2],), modes=("eval",))
    fxprune.prune.channels(traced, 0.5, importance=sensitivity, scope="local", round_to=1)
    for curve in sensitivity.curves:
        gone = (traced.get_buffer(f"{curve.name}_mask") == 0).all(1).nonzero()[:, 0].tolist()
        assert gone == sorted(curve.order[: curve.size // 2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_half_precision_is_measured_and_repaired(dtype: torch.dtype) -> None:
    model, x = attention("separate")
    model, x = model.to(dtype), x.to(dtype)
    traced = fxprune.trace(model, (x[:2],), modes=("eval",))
    fxprune.prune.channels(traced, macs=0.7, importance="obs", loader=x, round_to=1)
    fxprune.reconstruct(traced, x)
    assert traced.eval()(x).isfinite().all()


class Deaf(nn.Module):
    """Two layers read a stream: one hears it, the other one multiplies it with nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.live, self.dead = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        nn.init.zeros_(self.dead.weight)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.live(hidden) + self.dead(hidden)


def test_a_reader_that_gives_nothing_has_no_say_in_the_order() -> None:
    torch.manual_seed(0)
    model, x = Deaf().double().eval(), torch.randn(60, 4, dtype=torch.float64)
    (curve,) = measured(model, x).curves
    assert np.isfinite(curve.losses()).all()
    alone = copy.deepcopy(model)
    with torch.no_grad():
        alone.dead.weight.copy_(alone.live.weight)  # the same reader twice has the order of one
    assert curve.order == measured(alone, x).curves[0].order
    assert curve.order != tuple(range(8))


class Constant(nn.Module):
    """What is read is the same for every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, 4))
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(torch.tanh(self.first(self.start + 0 * x[:, :1])))


def test_inputs_that_never_change_lose_nothing() -> None:
    torch.manual_seed(0)
    model, x = Constant().double().eval(), torch.randn(60, 3, dtype=torch.float64)
    curve = next(each for each in measured(model, x).curves if each.name == "first.weight")
    assert max(curve.measured) < 1e-12


@pytest.mark.parametrize("offset", [-1.0, 1.0])
def test_what_a_function_gives_without_a_change_is_no_loss(offset: float) -> None:
    model, x = mlp(6, 16, 16, 4)

    def error(outputs: Tensor, dense: Tensor) -> Tensor:
        return (outputs - dense).square().mean()

    plain = measured(model, x, distance=error)
    shifted = measured(model, x, distance=lambda outputs, dense: error(outputs, dense) + offset)
    for one, other in zip(plain.curves, shifted.curves, strict=True):
        assert one.order == other.order
        assert other.measured == pytest.approx(one.measured, rel=1e-6, abs=1e-12)


def test_a_bias_of_zero_takes_the_mean_shift_like_any_other() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.last = nn.Linear(4, 12), nn.Linear(12, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            stream = self.first(x).exp()
            return self.last(torch.tanh(stream + self.inner(stream)))

    torch.manual_seed(0)
    model, x = Stream().double().eval(), torch.randn(60, 4, dtype=torch.float64)
    losses = []
    for bias in (0.0, 1e-12):
        nn.init.constant_(model.inner.bias, bias)
        losses.append(measured(model, x).curves[0].measured)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_readers_of_too_many_inputs_are_measured_without_being_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = mlp(6, 16, 4)
    (free,) = measured(model, x).curves
    monkeypatch.setattr("fxprune.prune.repair.input_moments.MOST_COLUMNS", 15)
    (bare,) = measured(model, x).curves
    norms = (model[0].weight.square().sum(1) + model[2].weight.square().sum(0)).detach()
    assert bare.order == tuple(norms.argsort().tolist())
    assert max(bare.measured) > max(free.measured)


class Moved(nn.Module):
    """A linear layer whose features end up on another axis."""

    def __init__(self, move: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.move = nn.Linear(4, 8), nn.Linear(8, 6), move

    def forward(self, x: Tensor) -> Tensor:
        return self.move(self.last(torch.tanh(self.first(x))))


@pytest.mark.parametrize(
    ("move", "distance"),
    [
        (lambda y: y.transpose(1, 2), "error"),
        (lambda y: y.flatten(1), "error"),
        (lambda y: y.reshape(-1, 6), "divergence"),
        (lambda y: functional.log_softmax(y, -1), "divergence"),
        (lambda y: y.softmax(1), "divergence of probabilities"),
    ],
)
def test_outputs_are_logits_where_their_features_still_lie_where_the_layer_put_them(
    move: Callable[[Tensor], Tensor], distance: str
) -> None:
    torch.manual_seed(0)
    assert measured(Moved(move).eval(), torch.randn(30, 5, 4)).distance == distance


class Memory(nn.Module):
    """Queries of every sample meet the same learned keys, in heads."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(6, 3)
        self.memory = nn.Parameter(torch.randn(1, 6, 8))

    def forward(self, x: Tensor) -> Tensor:
        query, key = (each.unflatten(-1, (2, 4)).transpose(1, 2) for each in (self.query(x), self.key(self.memory)))
        return self.last((query @ key.transpose(-1, -2)).softmax(-1).mean(1))


def test_keys_that_all_samples_share_are_no_shared_heads() -> None:
    torch.manual_seed(0)
    sensitivity = measured(Memory().double().eval(), torch.randn(20, 5, 8, dtype=torch.float64))
    assert sensitivity.curves
    assert all(np.isfinite(curve.losses()).all() for curve in sensitivity.curves)


@pytest.mark.parametrize("distance", ["error", "divergence", "cosine"])
def test_how_samples_fall_into_pieces_makes_no_difference(distance: str) -> None:
    model, x = mlp(6, 16, 4)
    x = x * torch.linspace(0.1, 3, len(x), dtype=torch.float64)[:, None]  # pieces of different energy
    fixed = [
        fxprune.sensitivity(
            fxprune.trace(copy.deepcopy(model), (x[:size],), modes=("eval",), dynamic_shapes=None),
            [*x.split(size)],
            distance=distance,
            max_samples=100,
        )
        for size in (1, 1)
    ]
    whole = measured(model, x, distance=distance, max_samples=100)
    for one, other in zip(fixed[0].curves, whole.curves, strict=True):
        assert one.order == other.order
        assert one.measured == pytest.approx(other.measured, rel=1e-6)


def test_a_layer_of_inputs_without_positions_is_read_once() -> None:
    model, x = mlp(6, 16, 16, 4)
    grouping = Grouping(fxprune.trace(model, (x[:2],), modes=("eval",)))
    assert [type(reading.reader).__name__ for reading in readings(grouping)] == ["MatrixReader"] * 3


def test_losses_of_the_output_are_not_divided_by_their_groups_mean() -> None:
    model, x = mlp(6, 16, 4)
    traced = fxprune.trace(model, (x[:2],), modes=("eval",))
    for importance in ("obs", fxprune.sensitivity(traced, x)):
        given = {"loader": x} if importance == "obs" else {}
        with pytest.raises(ArgumentError, match="normalize=True would be ignored"):
            fxprune.prune.channels(traced, 0.5, importance=importance, normalize=True, **given)
    assert not fxprune.prune.is_pruned(traced)
