"""Ranges of values: what an activation bounds makes a channel behind a layer and a clamp one number, and it goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from tests.fxprune.channels.exactness import EXACT, error
from tests.fxprune.channels.layers import Net, norm

DEAD = (1, 4)


def sunk(layer: Any, depth: float, rows: tuple[int, ...] = DEAD) -> Any:
    """A layer whose biases of some rows are as far below zero as their weights can reach, times `depth`."""
    weight = layer.weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else layer.weight
    with torch.no_grad():
        layer.bias.fill_(1.0)
        for row in rows:
            layer.bias[row] = -depth * weight[row].clamp(min=0).sum()
    return layer


def shapes(model: nn.Module, modes: Any = ("eval",), dtype: torch.dtype = torch.float64) -> dict[str, tuple[int, ...]]:
    """The sizes of the parameters that are left; the network computes the same on inputs of every size."""
    model = model.to(dtype).eval()
    x = torch.randn(2, 3, 6, 6, dtype=dtype)
    free: Any = ((dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO),),)
    final = fxprune.finalize(fxprune.trace(model, (x,), modes=modes, dynamic_shapes=free), align=1).eval()
    with torch.no_grad():
        for scale in (0.0, 1.0, 100.0) if dtype == torch.float64 else ():
            for size in (6, 7):
                other = scale * torch.randn(3, 3, size, size, dtype=dtype)
                other = torch.where(torch.rand_like(other) < 0.3, other.sign() * 1e4, other)
                assert error(model(other), final(other)) < EXACT
    return {name: tuple(tensor.shape) for name, tensor in final.named_parameters()}


def bounded(activation: Callable[[Tensor], Tensor], layer: Any, between: Any = None, last: Any = F.relu) -> nn.Module:
    """A convolution, an activation, a layer of six rows, what comes between, a clamp, and a layer that reads it."""
    return Net(
        lambda s, x: s.head(last(s.between(s.layer(activation(s.first(x)))))),
        first=nn.Conv2d(3, 5, 1), layer=layer, between=between or nn.Identity(), head=nn.Conv2d(6, 4, 1),
    )  # fmt: skip


LAYERS: dict[str, Callable[[], Any]] = {
    "one tap": lambda: sunk(nn.Conv2d(5, 6, 1), 1.1),
    "three taps": lambda: sunk(nn.Conv2d(5, 6, 3), 1.1),
    "three taps, zeros around": lambda: sunk(nn.Conv2d(5, 6, 3, padding=1), 1.1),
    "transposed": lambda: sunk(nn.ConvTranspose2d(5, 6, 3, padding=1), 1.1),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("activation", [torch.sigmoid, F.hardsigmoid, lambda x: x.clamp(-0.2, 0.9)])
def test_a_channel_that_a_bounded_input_cannot_lift_above_zero_goes(
    name: str, activation: Callable[[Tensor], Tensor]
) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    with torch.no_grad():
        layer.bias[list(DEAD)] -= 3 * layer.weight.abs().max() * layer.weight.numel() / 6 * 0.2
    left = shapes(bounded(activation, layer))
    assert left["head.weight"][1] == 4
    assert left["layer.bias"] == (4,)


def test_a_channel_that_may_just_reach_above_zero_stays() -> None:
    torch.manual_seed(0)
    assert shapes(bounded(torch.sigmoid, sunk(nn.Conv2d(5, 6, 1), 0.9)))["head.weight"][1] == 6
    exactly = bounded(torch.sigmoid, sunk(nn.Conv2d(5, 6, 1), 1.0))  # rounding may lift it
    assert shapes(exactly)["head.weight"][1] == 6


def test_of_a_transposed_layer_those_taps_count_that_a_position_meets() -> None:
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(5, 6, 2, 2)  # every position meets one tap of four
    with torch.no_grad():
        layer.weight.abs_()
        layer.bias.fill_(1.0)
        for row in DEAD:
            layer.bias[row] = -1.1 * layer.weight[:, row].flatten(1).sum(0).max()
    assert shapes(bounded(torch.sigmoid, layer))["layer.bias"] == (4,)


def test_in_groups_through_padding_pooling_and_a_norm() -> None:
    torch.manual_seed(0)
    layer = sunk(nn.Conv2d(6, 6, 3, groups=2), 1.0, ())
    between = norm(6)
    with torch.no_grad():
        reach = layer.weight.abs().flatten(1).sum(1) + 2
        assert between.running_mean is not None
        between.running_mean[list(DEAD)] = 10 * reach[list(DEAD)]
        between.bias.fill_(0.0)
    model = Net(
        lambda s, x: s.head(s.between(s.layer(F.max_pool2d(F.pad(torch.tanh(s.first(x)), [1] * 4, "reflect"), 2, 1)))),
        first=nn.Conv2d(3, 6, 1), layer=layer, between=nn.Sequential(between, nn.ReLU(inplace=True)),
        head=nn.Conv2d(6, 4, 1),
    )  # fmt: skip
    assert shapes(model)["head.weight"][1] == 4


def test_rows_of_a_linear_layer_and_the_upper_end_of_a_clamp() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 6)
    with torch.no_grad():
        layer.bias[[2, 3]] = 9.0
    model = Net(
        lambda s, x: s.head(F.hardtanh(s.layer(torch.sigmoid(s.first(x.mean((2, 3))))))),
        first=nn.Linear(3, 5), layer=layer, head=nn.Linear(6, 4),
    )  # fmt: skip
    left = shapes(model)
    assert left["layer.weight"] == (4, 5)
    assert left["head.weight"] == (4, 4)


def test_behind_a_relu_a_row_without_positive_weights_goes() -> None:
    torch.manual_seed(0)
    layer: Any = nn.Conv2d(5, 6, 3, padding=1)
    with torch.no_grad():
        layer.weight[list(DEAD)] = -layer.weight[list(DEAD)].abs()
        layer.bias.copy_(-layer.bias.abs() - 0.1)
    assert shapes(bounded(F.relu, layer))["layer.weight"] == (4, 5, 3, 3)
    assert shapes(bounded(F.leaky_relu, copy_of(layer)))["layer.weight"] == (6, 5, 3, 3)


def copy_of(layer: nn.Conv2d) -> nn.Conv2d:
    twin = nn.Conv2d(5, 6, 3, padding=1)
    twin.load_state_dict(layer.state_dict())
    return twin


STAY: dict[str, Callable[[Tensor], Tensor]] = {
    "sums of windows": lambda x: F.avg_pool2d(torch.sigmoid(x), 2, divisor_override=1),
    "a value that is written to": lambda x: torch.sigmoid(x).mul_(100),
    "a part that is written to": lambda x: written(torch.sigmoid(x)),
    "a clamp by a tensor": lambda x: torch.clamp(x, max=x.mean()),
    "no activation": lambda x: x * 2,
}


def written(x: Tensor) -> Tensor:
    x[:, 1] += 100
    return x * 1


@pytest.mark.parametrize("name", STAY)
def test_what_is_not_bounded_stays(name: str) -> None:
    torch.manual_seed(0)
    assert shapes(bounded(STAY[name], sunk(nn.Conv2d(5, 6, 1), 1.1)))["head.weight"][1] == 6


def test_in_half_precision_it_stays() -> None:
    torch.manual_seed(0)
    model = bounded(torch.sigmoid, sunk(nn.Conv2d(5, 6, 1), 1.5))
    assert shapes(model, dtype=torch.bfloat16)["head.weight"][1] == 6
    assert shapes(model, dtype=torch.float32)["head.weight"][1] == 4


def with_a_norm() -> nn.Module:
    torch.manual_seed(0)
    between = norm(6)
    with torch.no_grad():
        assert between.running_mean is not None
        between.running_mean[list(DEAD)] = 50
    return bounded(torch.sigmoid, nn.Conv2d(5, 6, 1), nn.Sequential(between))


def test_what_running_statistics_sink_stays_where_train_mode_may_raise_it() -> None:
    assert shapes(with_a_norm(), ("train", "eval"))["layer.bias"] == (6,)
    assert shapes(with_a_norm())["layer.bias"] == (4,)


def test_a_layer_that_train_mode_computes_alike_goes() -> None:
    torch.manual_seed(0)
    left = shapes(bounded(torch.sigmoid, sunk(nn.Conv2d(5, 6, 1), 1.1)), ("train", "eval"))
    assert left["layer.bias"] == (4,)
