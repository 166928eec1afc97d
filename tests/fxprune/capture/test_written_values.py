"""What forward writes into values, whole or in part: traced and finalized modules have it, and their gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.graph.equality import error


def numbered(x: Tensor) -> Tensor:
    found = torch.arange(4.0, dtype=x.dtype).expand(5, 4).clone()
    found[:, :2].add_(x[0, :, :2])
    return found * x


def blank(x: Tensor) -> Tensor:
    found = torch.zeros(4, dtype=x.dtype)
    found[1:] = x[0, 0, 1:]
    found.mul_(2.0)
    return found + x


def filled(x: Tensor) -> Tensor:
    found = torch.full((5, 4), 0.5, dtype=x.dtype)
    found[0].copy_(x[0, 0])
    torch.nn.functional.dropout(found, 0.5, False)[1].sub_(1.0)
    return found + x


class Writing(nn.Module):
    """Two layers, and a function of what they give."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.function = nn.Linear(6, 8), nn.Linear(8, 4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.down(self.up(x).relu()))


class Boxes(nn.Module):
    """Queries that depend on no input give points, to which a part of what layers give is added, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.points = nn.Parameter(torch.randn(5, 6)), nn.Linear(6, 2)
        self.mix, self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries.unsqueeze(0).repeat(x.shape[0], 1, 1)
        hidden = torch.zeros_like(queries) + self.mix(queries) + x
        found = self.down(self.up(hidden).relu())
        found[..., :2] += self.points(queries).sigmoid().transpose(0, 1).transpose(0, 1)
        return found.sigmoid()


@pytest.mark.parametrize(
    "build",
    [lambda: Writing(numbered), lambda: Writing(blank), lambda: Writing(filled), lambda: Writing(striped), Boxes],
)
def test_what_is_written_to_a_value_of_its_own_is_there(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = build().double().eval(), torch.randn(2, 5, 6, dtype=torch.float64)
    traced = fxprune.trace(model, x, modes=("eval",)).eval()
    assert torch.equal(model(x), traced(x))
    fxprune.prune.channels(traced, macs=0.7, round_to=1)
    masked = traced(x)
    assert error(masked, fxprune.finalize(traced, align=1)(x)) < 1e-12


def striped(x: Tensor) -> Tensor:
    found = torch.zeros_like(x)
    found[:, ::2].copy_(x[:, ::2])
    found.diagonal(dim1=1, dim2=2).fill_(3.0)
    found.as_strided((2, 2), (4, 1)).add_(1.0)
    return found


class Remembering(nn.Module):
    """A buffer of what the last calls gave, moved on and written by parts of it, which the result follows."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 4)
        self.register_buffer("last", torch.randn(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).relu()
        self.last[1:] = self.last[:-1].clone()
        self.last[0] = hidden.detach().mean((0, 1))
        found: Tensor = self.down(hidden + self.last.sum(0))
        return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("refused", [False, True])
def test_buffers_that_are_written_by_parts_go_on_as_before(dtype: torch.dtype, refused: bool) -> None:
    torch.manual_seed(0)
    model = Remembering().to(dtype).eval()
    with torch.no_grad():
        model.up.weight[2:5], model.up.bias[2:5] = 0.0, 0.0
    traced = fxprune.trace(model, torch.randn(2, 5, 6, dtype=dtype))
    eager, state = copy.deepcopy(model), copy.deepcopy(traced.state_dict())
    if refused:  # as where the rule of each operator has failed
        plain = copy.deepcopy(traced)
        names = {node.name: "refused" for node in plain.graphs["eval"].nodes if node.op == "call_function"}
        final = fxprune.passes.run_passes(plain, [fxprune.passes.RemoveChannels(refused=names)]).graph_module
    else:
        final = fxprune.finalize(traced, align=1)
    assert all(torch.equal(value, state[name]) for name, value in traced.state_dict().items())
    for batch in (2, 3, 2):
        x = torch.randn(batch, 5, 6, dtype=dtype)
        assert error(eager(x), final(x)) < (1e-12 if dtype == torch.float64 else 1e-5)
    assert error(eager.last, final.get_buffer("last")) < (1e-12 if dtype == torch.float64 else 1e-5)


def scaled(x: Tensor) -> Tensor:
    with torch.no_grad():
        x.mul_(2.0)
    return x


def part_blanked(x: Tensor) -> Tensor:
    found = x.clone()
    with torch.no_grad():
        found[:, 0] = 0.0
        found.add_(1.0).clamp_(-2.0, 2.0)
    return found * 3.0


def numbered_pieces(x: Tensor) -> Tensor:
    found = x.clone()
    found.unbind(1)
    with torch.no_grad():
        for number, piece in enumerate(found.unbind(1)):
            piece.add_(number)
    return found * 2.0


def turned(x: Tensor) -> Tensor:
    found = x[:, :4].detach().clone()
    with torch.no_grad():
        found.transpose_(1, 2).mul_(2.0)
    return found + x[:, :4]


def replaced(x: Tensor) -> Tensor:
    found, sums = torch.zeros_like(x), torch.empty(0)
    with torch.no_grad():
        found.set_(x.detach() * 2.0)  # type: ignore[call-overload]
        torch.add(x, 1.0, out=sums)
    return x + found + sums


class Decaying(nn.Module):
    """A parameter that forward makes smaller, beside the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gain = nn.Linear(6, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.gain.mul_(0.9)
        return self.layer(x) * self.gain


@pytest.mark.parametrize(
    "build",
    [
        lambda: Writing(scaled),
        lambda: Writing(part_blanked),
        lambda: Writing(numbered_pieces),
        lambda: Writing(turned),
        lambda: Writing(replaced),
        Decaying,
    ],
)
def test_what_is_written_without_gradients_keeps_those_of_what_was_there(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = build(), torch.randn(2, 5, 6)
    eager, traced = copy.deepcopy(model), fxprune.trace(model, x)
    for mode in (True, False, True):
        for module in (eager, traced.train(mode)):
            module.train(mode)(x).square().sum().backward()
    final = fxprune.finalize(traced)
    assert torch.equal(final(x), eager.eval()(x))
    traced(x)
    for (name, expected), (_, found) in zip(eager.named_parameters(), traced.named_parameters(), strict=True):
        assert torch.equal(found, expected), name
        assert expected.grad is not None
        assert found.grad is not None
        assert torch.equal(found.grad, expected.grad), name
