"""Recurrent cells and the inner layers of stacks: what reads the input, and what reads the state, is refitted."""

from __future__ import annotations

import copy
import functools
import itertools
import operator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.graph.interpretation import run
from fxprune.graph.names import tensor_at
from fxprune.prune.repair.stacks import in_single_layers
from tests.fxprune.prune.test_repair_of_states import masked_value

CELLS = ["LSTMCell", "GRUCell", "RNNCell"]
LAYERS = ["LSTM", "GRU", "RNN"]


class Cells(nn.Module):
    """Words through one or two cells, step by step, and a class for each; with `feeds`, classes go back in."""

    def __init__(self, kind: str, two: bool = False, feeds: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.embed, self.feeds = nn.Linear(5, 8), feeds
        self.cell = getattr(nn, kind)(8 + 3 * feeds, 8, bias=bias)
        self.second = getattr(nn, kind)(8, 8, bias=bias) if two else None
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        words = self.embed(x).tanh()
        first, second, outputs = None, None, list[Tensor]()
        given = 0 * words[:, 0, :3]
        for step in range(x.shape[1]):
            data = torch.cat([words[:, step], given], 1) if self.feeds else words[:, step]
            first = self.cell(data, first)
            state = self._state(first)
            if self.second is not None:
                second = self.second(state, second)
                state = self._state(second)
            given = self.head(state)
            outputs.append(given)
        return torch.stack(outputs, 1)

    def _state(self, given: Any) -> Tensor:
        return given[0] if isinstance(given, tuple) else given  # type: ignore[no-any-return]


class Stack(nn.Module):
    """Words through layers of hidden units, and a class for each."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.rnn = getattr(nn, kind)(8, 8, batch_first=True, **options)
        units = (self.rnn.proj_size or 8) * (2 if self.rnn.bidirectional else 1)
        self.head = nn.Linear(units, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x).tanh())[0])  # type: ignore[no-any-return]


def drawn(build: Any, *options: Any, **named: Any) -> tuple[Any, Tensor]:
    """A network whose states matter, and sequences."""
    torch.manual_seed(0)
    model = build(*options, **named).double().eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        weight *= 2 if "weight_" in name else 1
    return model, torch.randn(60, 5, 5, dtype=torch.float64).cumsum(1) / 2


def halved(model: nn.Module, x: Tensor, **options: Any) -> fxprune.TracedModule:
    """A copy without half of the units."""
    traced = fxprune.trace(copy.deepcopy(model), x, modes=("eval",)).eval()
    fxprune.prune.channels(traced, 0.5, round_to=1, **options)
    return traced


def with_values(traced: fxprune.TracedModule, model: Any) -> Any:
    """The eager model with the masked and refitted values of a traced one."""
    found = copy.deepcopy(model)
    for name, parameter in found.named_parameters():
        parameter.copy_(masked_value(traced, name).detach())
    return found


def assert_fitted(traced: fxprune.TracedModule, names: tuple[str, str], data: Tensor, target: Tensor) -> None:
    """A weight and a bias are the least-squares fit of a target, [rows, outputs], to what is read, [rows, columns]."""
    weight, bias = (masked_value(traced, name) for name in names)
    mask = traced.get_buffer(f"{names[0]}_mask") != 0
    rows, columns = mask.any(1), mask.any(0)
    assert 0 < int(columns.sum()) < mask.shape[1]
    design = torch.cat([data[:, columns], torch.ones(len(data), 1)], 1)
    fitted = torch.linalg.lstsq(design, target).solution.T
    torch.testing.assert_close(weight[rows][:, columns], fitted[rows, :-1])
    torch.testing.assert_close(bias[rows], fitted[rows, -1])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_inner_layers_get_the_fit_of_dense_algebra_to_what_they_receive(kind: str, bidirectional: bool) -> None:
    model, x = drawn(Stack, kind, num_layers=3, bidirectional=bidirectional)
    traced = halved(model, x)
    report = fxprune.reconstruct(traced, x, damping=0.0)
    repaired = with_values(traced, model)
    torch.testing.assert_close(traced(x), repaired(x))
    for layer in (1, 2):
        below = {}
        for name, network in (("own", repaired), ("reference", model)):
            part = getattr(nn, kind)(8, 8, layer, batch_first=True, bidirectional=bidirectional).double()
            part.load_state_dict({key: network.rnn.state_dict()[key] for key in part.state_dict()})
            below[name] = part(network.embed(x).tanh())[0].detach().flatten(0, 1)
        for way in ("", "_reverse")[: 1 + bidirectional]:
            assert f"rnn.weight_ih_l{layer}" in report.refitted
            weight, bias = (getattr(model.rnn, f"{what}_ih_l{layer}{way}") for what in ("weight", "bias"))
            names = f"rnn.weight_ih_l{layer}{way}", f"rnn.bias_ih_l{layer}{way}"
            assert_fitted(traced, names, below["own"], below["reference"] @ weight.T + bias)


@pytest.mark.parametrize("kind", LAYERS)
def test_hidden_weights_of_inner_layers_get_the_fit_to_the_states_of_the_reference(kind: str) -> None:
    model, x = drawn(Stack, kind, num_layers=2)
    traced = halved(model, x)
    report = fxprune.reconstruct(traced, x, damping=0.0)
    assert "rnn.weight_hh_l0" in report.refitted
    first = getattr(nn, kind)(8, 8, batch_first=True).double()
    first.load_state_dict({key: model.rnn.state_dict()[key] for key in first.state_dict()})
    states = first(model.embed(x).tanh())[0].detach().flatten(0, 1)
    target = states @ model.rnn.weight_hh_l0.T + model.rnn.bias_hh_l0
    assert_fitted(traced, ("rnn.weight_hh_l0", "rnn.bias_hh_l0"), states, target)


def states_of(cell: Any, words: Tensor) -> Tensor:
    """What a cell starts each step from, [samples, steps, units]."""
    found, given = [words.new_zeros(len(words), 8)], None
    for step in range(words.shape[1]):
        given = cell(words[:, step], given)
        found.append(given[0] if isinstance(given, tuple) else given)
    return torch.stack(found, 1)


@pytest.mark.parametrize("kind", CELLS)
def test_cells_get_the_fit_of_dense_algebra_over_all_steps(kind: str) -> None:
    model, x = drawn(Cells, kind, two=True)
    traced = halved(model, x)
    report = fxprune.reconstruct(traced, x, damping=0.0)
    repaired = with_values(traced, model)
    torch.testing.assert_close(traced(x), repaired(x))
    words = [network.embed(x).tanh() for network in (repaired, model)]
    for name in ("cell", "second"):
        cells = [getattr(network, name) for network in (repaired, model)]
        assert {f"{name}.weight_ih", f"{name}.weight_hh"} <= {*report.refitted}
        own, reference = (each.flatten(0, 1) for each in words)
        target = reference @ cells[1].weight_ih.T + cells[1].bias_ih
        assert_fitted(traced, (f"{name}.weight_ih", f"{name}.bias_ih"), own, target)
        states = [states_of(cell, each) for cell, each in zip(cells, words, strict=True)]
        before = states[1][:, :-1].flatten(0, 1)
        target = before @ cells[1].weight_hh.T + cells[1].bias_hh
        assert_fitted(traced, (f"{name}.weight_hh", f"{name}.bias_hh"), before, target)
        words = [each[:, 1:] for each in states]


@pytest.mark.parametrize(
    ("build", "kind", "options"),
    [
        *(pytest.param(Cells, kind, {}, marks=pytest.mark.slow) for kind in CELLS),
        *((Cells, kind, {"feeds": True}) for kind in CELLS),
        (Cells, "GRUCell", {"bias": False, "two": True}),
        *((Stack, kind, {"num_layers": 3, "bidirectional": True}) for kind in LAYERS),
        (Stack, "LSTM", {"num_layers": 2, "proj_size": 4}),
        (Stack, "GRU", {"num_layers": 2, "bias": False}),
    ],
)
def test_outputs_come_nearer_and_what_is_left_is_removed_exactly(
    build: Any, kind: str, options: dict[str, Any]
) -> None:
    model, x = drawn(build, kind, **options)
    others = torch.randn(200, 5, 5, dtype=torch.float64).cumsum(1) / 2
    traced = halved(model, x)
    before = (traced(others) - model(others)).square().sum()
    report = fxprune.reconstruct(traced, x)
    assert report.output[1] <= report.output[0]
    after = (traced(others) - model(others)).square().sum()
    assert after < 0.9 * before
    assert any("weight_hh" in name for name in report.refitted)
    final = fxprune.finalize(traced, align=1)
    for batch in (1, 7, 200):
        torch.testing.assert_close(final(others[:batch]), traced(others[:batch]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", LAYERS)
def test_readers_are_never_worse_on_samples_that_they_were_judged_by(kind: str) -> None:
    model, x = drawn(Stack, kind, num_layers=2)
    report = fxprune.reconstruct(halved(model, x), x)
    assert all(each.after <= each.before for each in report.readers.values())


def test_how_samples_are_batched_makes_no_difference() -> None:
    model, x = drawn(Cells, "LSTMCell", two=True)
    found = []
    for batches in (x, [*x.split(7)]):
        traced = halved(model, x)
        fxprune.reconstruct(traced, batches)
        found.append(masked_value(traced, "second.weight_ih"))
    torch.testing.assert_close(*found)


def test_a_single_step_from_a_state_that_is_given_is_refitted() -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.GRUCell(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, state: Tensor) -> Tensor:
            return self.head(self.cell(x, state.tanh()))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Step().double().eval().requires_grad_(False)
    inputs = torch.randn(60, 5, dtype=torch.float64), torch.randn(60, 8, dtype=torch.float64)
    inputs[1][:, 4:] = inputs[1][:, :4] + 0.1 * inputs[1][:, 4:]
    traced = fxprune.trace(copy.deepcopy(model), inputs, modes=("eval",)).eval()
    mask = torch.ones(24, 8)
    mask[:, 6:] = 0
    fxprune.prune.custom_from_mask(traced, "cell.weight_hh", mask)
    report = fxprune.reconstruct(traced, inputs, damping=0.0)
    assert report.refitted == ["cell.weight_hh", "head.weight"] or report.refitted == ["cell.weight_hh"]
    states = inputs[1].tanh()
    target = states @ model.cell.weight_hh.T + model.cell.bias_hh
    assert_fitted(traced, ("cell.weight_hh", "cell.bias_hh"), states, target)


def test_a_cell_whose_weights_are_computed_is_left_alone_and_named() -> None:
    model, x = drawn(Cells, "GRUCell")
    traced = fxprune.trace(copy.deepcopy(model), x, modes=("eval",)).eval()
    fxprune.spectral_norm(traced, "cell.weight_ih")
    fxprune.prune.ln_structured(traced, "embed.weight", 0.5, n=2, dim=0)
    report = fxprune.reconstruct(traced, x)
    assert any("computed" in why for why in report.alone.values())
    assert "cell.weight_ih" not in report.refitted


def test_another_network_is_the_reference_and_stays_as_it_is() -> None:
    model, x = drawn(Stack, "LSTM", num_layers=2)
    traced = halved(model, x)
    with torch.no_grad():
        traced.get_parameter("rnn.weight_ih_l1_orig").mul_(1.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = fxprune.reconstruct(traced, x, reference=model)
    assert {"rnn.weight_ih_l1", "rnn.weight_hh_l0"} <= {*report.refitted}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("build", "kind"), [*((Cells, kind) for kind in CELLS), *((Stack, kind) for kind in LAYERS)])
def test_curves_see_that_units_read_by_cells_and_inner_layers_say_the_same(build: Any, kind: str) -> None:
    """Of two units that are alike, and read by large weights, one goes early: what reads them makes up for it."""
    model, x = drawn(build, kind, **({"num_layers": 2} if build is Stack else {}))
    if build is Stack:
        gates = model.rnn.weight_ih_l0.shape[0] // 8
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            rows = getattr(model.rnn, name).unflatten(0, (gates, 8))
            rows[:, 3] = rows[:, 5]
        model.rnn.weight_ih_l1[:, [3, 5]] *= 3
        name = "rnn.weight_ih_l0"
    else:
        model.embed.weight[3], model.embed.bias[3] = model.embed.weight[5], model.embed.bias[5]
        model.cell.weight_ih[:, [3, 5]] *= 3
        name = "embed.weight"
    traced = fxprune.trace(model, x, modes=("eval",)).eval()
    sensitivity = fxprune.sensitivity(traced, x, distance="error")
    curve = next(curve for curve in sensitivity.curves if curve.name == name)
    early, late = sorted(map(curve.order.index, (3, 5)))
    assert early <= 3
    assert late >= 6


def test_single_layers_compute_what_the_stack_does_and_other_nodes_keep_their_names() -> None:
    for kind, options in itertools.product(LAYERS, ({}, {"bidirectional": True}, {"bias": False})):
        model, x = drawn(Stack, kind, num_layers=3, **options)
        traced = fxprune.trace(model, x, modes=("eval",)).eval()
        graph = traced.graphs["eval"]
        before = str(graph)
        found = in_single_layers(graph)
        assert str(graph) == before
        assert sum("rnn" in str(node.target) or kind.lower() in str(node.target) for node in found.nodes) >= 3
        names = {node.name for node in found.nodes}
        taken = [node for node in graph.nodes if node.target is not operator.getitem and "params" not in node.name]
        assert sum(node.name not in names for node in taken) == 1
        (output,) = run(found, functools.partial(tensor_at, traced), [x])
        torch.testing.assert_close(output, model(x))
        assert in_single_layers(found) is found
