"""In which metric errors of readers count: second moments of gradients, against dense algebra and autograd."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.channels.groups import Grouping
from fxprune.prune.repair.batches import Batches
from fxprune.prune.repair.finding import find
from fxprune.prune.repair.pieces import Pieces
from fxprune.prune.repair.shelf import Shelf
from fxprune.prune.sensitivity import metrics
from fxprune.prune.sensitivity.distances import OutputDistance
from fxprune.prune.sensitivity.metrics import output_metrics


def found_metrics(model: nn.Module, x: Tensor, distance: str) -> dict[str, tuple[Tensor, Tensor]]:
    """By the name of a weight, G, and the weighted second moment of the inputs."""
    traced = fxprune.trace(copy.deepcopy(model).double().eval(), (x[:2],), modes=("eval",))
    graph = traced.graphs["eval"]
    with Shelf() as shelf, torch.no_grad():
        pieces = Pieces(shelf)
        batches = Batches(traced, graph, x, None)
        for piece in batches:
            if not piece.is_held:
                pieces.add(piece)
        readers = find(traced, graph)[0]
        found = output_metrics(graph, traced.get_parameter, readers, batches, pieces, OutputDistance(graph, distance))
    return {reader.name: (own.root @ own.root.transpose(1, 2), own.square) for reader, own in found.items()}


def drawn(samples: int, *shape: int) -> Tensor:
    """The draws of samples, by their numbers."""
    return torch.stack(
        [
            torch.randn(shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
            for number in range(samples)
        ]
    )


def shrunk(square: Tensor, rows: int) -> Tensor:
    share = 0.1 * len(square) / (rows + len(square))
    return (1 - share) * square + share * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)


def test_of_a_layer_before_another_it_is_what_that_one_makes_of_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_MOST_BYTES", 2000)  # a few samples at once
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Linear(6, 3)), torch.randn(100, 5).double()
    found = found_metrics(model, x, "error")
    samples = 40  # of the 80 that are fitted one in two
    last = drawn(samples, 3)
    before = last @ model[3].weight.detach().double()
    assert torch.allclose(found["3.weight"][0][0], shrunk(last.T @ last, samples), rtol=1e-8)
    assert torch.allclose(found["2.weight"][0][0], shrunk(before.T @ before, samples), rtol=1e-8)
    expected = model[3].weight.detach().double().T @ model[3].weight.detach().double()
    assert torch.corrcoef(torch.stack([found["2.weight"][0].flatten(), expected.flatten()]))[0, 1] > 0.8


def test_of_a_grouped_convolution_there_is_one_for_each_of_its_groups() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 2, 1)).double()
    x = torch.randn(20, 4, 5, 5, dtype=torch.float64)
    found, _ = found_metrics(model, x, "error")["0.weight"]
    samples = 16
    fitted = x[[number for number in range(20) if number % 5 != 1]]
    inner = model[0](fitted).detach().requires_grad_()
    output = model[2](model[1](inner))
    (gradient,) = torch.autograd.grad(output, inner, drawn(samples, 2, 3, 3))
    rows = gradient.movedim(1, -1).reshape(-1, 2, 4)
    for group in range(2):
        own = rows[:, group].T @ rows[:, group]
        mean = torch.einsum("rgo->", rows.square()) / 8
        share = 0.1 * 4 / (len(rows) + 4)
        wanted = (1 - share) * own + share * mean * torch.eye(4, dtype=torch.float64)
        assert torch.allclose(found[group], wanted, rtol=1e-8)


@pytest.mark.parametrize("bias", [True, False])
def test_inputs_count_more_where_the_output_moves_more(bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6, bias=bias), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(20, 7, 5, dtype=torch.float64)
    _, found = found_metrics(model, x, "error")["2.weight"]
    fitted = x[[number for number in range(20) if number % 5 != 1]]
    inputs = model[1](model[0](fitted)).detach()
    inner = model[2](inputs).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model[4](model[3](inner)), inner, drawn(16, 7, 3))
    weight, rows = gradient.square().sum(-1).flatten(), inputs.flatten(0, 1)
    if bias:
        rows = rows - (weight[:, None] * rows).sum(0) / weight.sum()
    assert torch.allclose(found[0], rows.T @ (weight[:, None] * rows) / weight.sum(), rtol=1e-8, atol=1e-12)


def divergence(value: Tensor, dense: Tensor) -> Tensor:
    return (dense.softmax(-1) * (dense.log_softmax(-1) - value.log_softmax(-1))).sum()


def divergence_of_probabilities(value: Tensor, dense: Tensor) -> Tensor:
    return (dense * (dense / value).log()).sum()


def cosine(value: Tensor, dense: Tensor) -> Tensor:
    return 1 - torch.cosine_similarity(value, dense, -1)


@pytest.mark.parametrize(
    "function", [divergence, divergence_of_probabilities, cosine], ids=lambda each: each.__name__.replace("_", " ")
)
def test_what_goes_back_squares_to_the_second_derivative_of_the_distance(
    function: Callable[[Tensor, Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    dense = torch.randn(5, dtype=torch.float64)
    if function is divergence_of_probabilities:
        dense = dense.softmax(-1)
    second: Any = torch.autograd.functional.hessian(lambda value: function(value, dense), dense)  # type: ignore[no-untyped-call]
    root = torch.stack(
        [
            metrics._direction(function.__name__.replace("_", " "), -1, dense, unit)
            for unit in torch.eye(5, dtype=torch.float64)
        ]
    )
    off = root.T @ root - second
    if function is divergence_of_probabilities:  # what leads out of the probabilities does not come up
        off -= off.mean()
    assert off.abs().max() < 1e-9


class Loud(nn.Module):
    """Half of the hidden units are read loudly, and what that gives hardly counts."""

    def __init__(self, after: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.hidden, self.reader, self.head = nn.Linear(8, 16), nn.Linear(16, 2), nn.Linear(2, 4)
        self.after = after
        with torch.no_grad():
            self.reader.weight[0, 8:] = self.reader.weight[1, :8] = 0
            self.reader.weight[0, :8], self.reader.weight[1, 8:] = 3, 1
            self.head.weight[:, 0] *= 1e-4

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.after(self.reader(torch.tanh(self.hidden(x)))))


def first_half(model: nn.Module, x: Tensor) -> set[int]:
    sensitivity = fxprune.sensitivity(
        fxprune.trace(model.double().eval(), (x[:2],), modes=("eval",)), x, distance="error", targets="hidden"
    )
    return set(sensitivity.curves[0].order[:8])


def test_what_the_output_does_not_hear_goes_first_however_loud() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 8, dtype=torch.float64)
    assert first_half(Loud(), x) == set(range(8))


def without_derivative(x: Tensor) -> Tensor:
    return x + torch.special.zeta(2 + x.sigmoid(), 2 + x.sigmoid())


def test_where_no_gradient_comes_through_the_readers_own_errors_say_what_goes() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 8, dtype=torch.float64)
    for after in (without_derivative, torch.round):
        assert len(first_half(Loud(after), x) & set(range(8, 16))) > 4


@torch.library.custom_op("fxprune_tests::halved", mutates_args=())
def halved(x: Tensor) -> Tensor:
    return x / 2


@halved.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def spoilt(x: Tensor) -> Tensor:
    y = x.exp()
    return y.add_(y.sigmoid().mul_(2))


def without_formula(x: Tensor) -> Tensor:
    y: Tensor = halved(x)
    return y


@pytest.mark.parametrize("after", [without_formula, spoilt])
def test_operators_that_autograd_cannot_go_back_through_leave_no_metric(after: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), Behind(after))
    assert not found_metrics(model, torch.rand(100, 4).double(), "error")
    assert found_metrics(nn.Sequential(model[0], model[1]), torch.rand(100, 4).double(), "error")


class Behind(nn.Module):
    def __init__(self, after: Any) -> None:
        super().__init__()
        self.after = after

    def forward(self, x: Tensor) -> Any:
        return self.after(x)


def test_other_errors_on_the_way_back_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("fxprune.prune.sensitivity.metrics._directions", fail)
    with pytest.raises(torch.OutOfMemoryError):
        found_metrics(nn.Linear(4, 4).double().eval(), torch.rand(100, 4).double(), "error")


def test_readers_of_one_group_are_compared_by_what_the_output_loses() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.one, self.other = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 4)
            with torch.no_grad():
                self.one.weight[:, 8:] = 0
                self.other.weight[:, :8] = 0

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.hidden(x))
            return 1e-3 * self.one(hidden) + self.other(hidden)

    torch.manual_seed(0)
    x = torch.randn(200, 8, dtype=torch.float64)
    assert first_half(Two(), x) == set(range(8))


def test_measuring_leaves_gradients_and_modes_as_they_were() -> None:
    torch.manual_seed(0)
    model, x = Loud(), torch.randn(40, 8)
    traced = fxprune.trace(model.eval(), (x[:2],), modes=("eval",))
    with torch.inference_mode():
        inside = fxprune.sensitivity(traced, x, distance="error")
    outside = fxprune.sensitivity(traced, x, distance="error")
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert [curve.order for curve in inside.curves] == [curve.order for curve in outside.curves]
    assert Grouping(traced).groups


class OnlyLarge(nn.Module):
    """What is above 1 of a linear map of 8 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8, bias=False), nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.last(self.first(x)) - 0.3).relu()


@pytest.mark.parametrize(("moved", "tells"), [(2, False), (60, True)])
def test_where_the_output_moves_with_fewer_rows_than_a_reader_has_outputs_gradients_have_no_say(
    moved: int, tells: bool
) -> None:
    torch.manual_seed(0)
    model, x = OnlyLarge(), 0.001 * torch.randn(100, 5).double()
    x[torch.arange(moved) * 100 // moved] *= 5000
    assert ("first.weight" in found_metrics(model, x, "error")) == tells


def test_a_reader_that_gradients_will_have_no_say_in_is_given_up_early_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 3)), torch.randn(100, 5).double()
    added: list[str] = []
    add = metrics._Sums.add

    def counted(self: Any, *rows: Any) -> None:
        added.append(self.reader.name)
        add(self, *rows)

    monkeypatch.setattr(metrics._Sums, "add", counted)
    model[2].weight.data[:, 1:] = 0  # outputs move with one unit, at a few samples
    model[0].weight.data[0] *= 20
    monkeypatch.setattr(metrics, "_MOST_BYTES", 2**14)
    found = found_metrics(model, x, "error")
    assert added.count("0.weight") < added.count("2.weight")
    monkeypatch.setattr(metrics, "_AHEAD", math.inf)
    again = found_metrics(model, x, "error")
    assert found.keys() == again.keys() == {"2.weight"}
    assert all(torch.equal(one, other) for one, other in zip(found["2.weight"], again["2.weight"], strict=True))
