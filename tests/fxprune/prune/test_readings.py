"""Curves against networks built by hand: units zeroed, readers refitted by dense algebra, run by eager torch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

import fxprune
from fxprune.channels.groups import Grouping
from fxprune.prune.repair.products import Product
from fxprune.prune.sensitivity.analysis import DAMPING
from fxprune.prune.sensitivity.readings import readings
from tests.attention_spellings import SIZE, WIDTH, attention
from tests.repairs import HELD, READERS, chain


def refitted(reader: nn.Module, inputs: Tensor, live: Tensor) -> dict[str, Tensor]:
    """The parameters that make up for the inputs of dead entries of the weight, by one column for each entry."""
    parameters = {name: tensor.detach() for name, tensor in reader.named_parameters()}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    weight = parameters["weight"]
    entries = torch.eye(weight.numel(), dtype=torch.float64).reshape(-1, *weight.shape)
    columns = vmap(lambda entry: functional_call(reader, zeros | {"weight": entry}, inputs))(entries)
    columns = columns.movedim(-1 if inputs.dim() == 2 else 2, 1).flatten(2)  # [entries, outputs, rows]
    means = columns.mean(2)
    owner = columns.abs().sum(2).argmax(1)  # the output that an entry belongs to
    own = columns[torch.arange(len(owner)), owner]
    own = own - own.mean(1, keepdim=True) if "bias" in parameters else own
    square = own @ own.T / own.shape[1] * (owner[:, None] == owner)
    changed = weight.flatten().clone()
    gone, kept = (~live.flatten()).nonzero()[:, 0], live.flatten().nonzero()[:, 0]
    for output in owner.unique():
        here = owner == output
        dead, rest = gone[here[gone]], kept[here[kept]]
        damped = square[rest[:, None], rest]
        damped = damped + DAMPING * square.diagonal()[here].mean() * torch.eye(len(rest), dtype=torch.float64)
        changed[rest] += torch.linalg.solve(damped, square[rest[:, None], dead] @ weight.flatten()[dead])
    changed[gone] = 0
    found = {"weight": changed.reshape(weight.shape)}
    if "bias" in parameters:
        found["bias"] = parameters["bias"] - (changed - weight.flatten()) @ means
    return found


def by_input(kind: str, live: Tensor, groups: int) -> Tensor:
    """A view of entries of a weight, [groups, inputs of each, ...]."""
    live = live.unflatten(0, (groups, -1))
    return live if "transposed" in kind or kind == "addmm" else live.transpose(1, 2)


def lost(own: Tensor, dense: Tensor) -> float:
    """The error relative to the spread."""
    return float((own - dense).square().sum() / (dense - dense.mean()).square().sum())


@pytest.mark.parametrize("kind", [kind for kind in READERS if kind != "depthwise"])
@torch.no_grad()
def test_curves_of_every_kind_of_reader_are_those_of_networks_built_by_dense_algebra(kind: str) -> None:
    torch.manual_seed(0)
    build, space = READERS[kind]
    model, x = chain(build(), space, 6)
    traced = fxprune.trace(copy.deepcopy(model), (x[:2],), modes=("eval",))
    (curve,) = fxprune.sensitivity(traced, x, distance="error", targets="first", shares=(0.3, 0.7)).curves
    assert curve.counts == (2, 4)
    for count, measured in zip(curve.counts, curve.measured, strict=True):
        alive = torch.ones(6, dtype=torch.bool)
        alive[list(curve.order[:count])] = False
        built = copy.deepcopy(model)
        for tensor in built.first.parameters():
            tensor[~alive] = 0
        live = torch.ones_like(built.reader.weight, dtype=torch.bool)
        entries = by_input(kind, live, getattr(built.reader, "groups", 1))
        for channel in (~alive).nonzero()[:, 0].tolist():
            entries[channel // entries.shape[1], channel % entries.shape[1]] = False
        fitted = refitted(model.reader, torch.tanh(model.first(x[~HELD])), live)
        for name, tensor in built.reader.named_parameters():
            tensor.copy_(fitted[name])
        assert measured == pytest.approx(lost(built(x[HELD]), model(x[HELD])), rel=1e-6)


class Stream(nn.Module):
    """Channels that three layers read, one of them behind a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(3, 6), nn.Linear(6, 4)
        self.one, self.joined = nn.Linear(6, 3), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        return self.one(y) + self.joined(torch.cat([torch.tanh(self.inner(y)), y], 1))


@torch.no_grad()
def test_all_readers_of_a_stream_make_up_for_it_behind_a_concatenation_too() -> None:
    torch.manual_seed(0)
    model, x = Stream().double().eval(), torch.randn(40, 3, dtype=torch.float64)
    traced = fxprune.trace(copy.deepcopy(model), (x[:2],), modes=("eval",))
    (curve,) = fxprune.sensitivity(traced, x, distance="error", targets="first", shares=(0.2, 0.5)).curves
    y = torch.tanh(model.first(x[~HELD]))
    inputs = {"one": y, "inner": y, "joined": torch.cat([torch.tanh(model.inner(y)), y], 1)}
    for count, measured in zip(curve.counts, curve.measured, strict=True):
        gone = list(curve.order[:count])
        built = copy.deepcopy(model)
        for tensor in built.first.parameters():
            tensor[gone] = 0
        for name, given in inputs.items():
            live = torch.ones_like(model.get_submodule(name).weight, dtype=torch.bool)
            live[:, [-6 + unit for unit in gone]] = False
            built.get_submodule(name).load_state_dict(refitted(model.get_submodule(name), given, live))
        assert measured == pytest.approx(lost(built(x[HELD]), model(x[HELD])), rel=1e-6)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@torch.no_grad()
def test_the_input_weights_of_recurrent_layers_make_up_for_what_they_read(kind: str) -> None:
    torch.manual_seed(0)

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.reader = nn.Linear(3, 6), getattr(nn, kind)(6, 2, bidirectional=True, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.reader(torch.tanh(self.first(x)))[0]

    model, x = Steps().double().eval(), torch.randn(40, 4, 3, dtype=torch.float64)
    traced = fxprune.trace(copy.deepcopy(model), (x[:2],), modes=("eval",))
    (curve,) = fxprune.sensitivity(traced, x, distance="error", targets="first", shares=(0.2, 0.5)).curves
    hidden = torch.tanh(model.first(x[~HELD])).flatten(0, 1)
    for count, measured in zip(curve.counts, curve.measured, strict=True):
        gone = list(curve.order[:count])
        built = copy.deepcopy(model)
        for tensor in built.first.parameters():
            tensor[gone] = 0
        for end in ("", "_reverse"):
            weight, bias = (getattr(built.reader, f"{name}_ih_l0{end}") for name in ("weight", "bias"))
            layer = nn.Linear(6, len(bias)).double()
            layer.load_state_dict({"weight": weight, "bias": bias})
            live = torch.ones_like(weight, dtype=torch.bool)
            live[:, gone] = False
            found = refitted(layer, hidden, live)
            weight.copy_(found["weight"])
            bias.copy_(found["bias"])
        assert measured == pytest.approx(lost(built(x[HELD]), model(x[HELD])), rel=1e-6)


@pytest.mark.parametrize(
    "spelling", ["separate", "explicit", "einsum", "einsum of positions first", "shared by repeat", "chunk"]
)
@torch.no_grad()
def test_what_reads_heads_makes_up_for_those_that_go(spelling: str) -> None:
    model, x = attention(spelling)
    held = torch.arange(len(x)) % 5 == 1
    traced = fxprune.trace(copy.deepcopy(model), (x[:2],), modes=("eval",))
    kind = "key-value group" if "shared" in spelling else "attention head"
    (curve,) = fxprune.sensitivity(traced, x, distance="error", kinds=[kind], shares=(0.2, 0.5)).curves
    seen: list[Tensor] = []
    model.out.register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    model(x[~held])
    width = WIDTH // curve.size
    for count, measured in zip(curve.counts, curve.measured, strict=True):
        gone = [unit * width + i for unit in curve.order[:count] for i in range(width)]
        live = torch.ones(WIDTH, WIDTH, dtype=torch.bool)
        live[:, gone] = False
        built = copy.deepcopy(model)
        built.out.load_state_dict(refitted(model.out, seen[0].flatten(0, 1), live))
        assert measured == pytest.approx(lost(built(x[held]), model(x[held])), rel=1e-6)


@pytest.mark.parametrize("spelling", ["explicit", "scaled before", "einsum", "einsum of positions first"])
@torch.no_grad()
def test_products_of_queries_and_keys_count_alike_however_they_are_written(spelling: str) -> None:
    """Curves of heads and of the channels within them, and what a product of its own has a say in."""
    model, x = attention("separate")
    written, _ = attention(spelling)
    written.load_state_dict(model.state_dict())
    if spelling.startswith("einsum"):  # without the scale
        for tensor in written.q.parameters():
            tensor *= SIZE**-0.5
    found = []
    for each in (model, written):
        traced = fxprune.trace(each, (x[:2],), modes=("eval",))
        products = [reading for reading in readings(Grouping(traced)) if isinstance(reading.reader, Product)]
        assert len(products) == 1
        found.append(fxprune.sensitivity(traced, x, distance="error").curves)
    for one, other in zip(*found, strict=True):
        assert (one.kind, one.order, one.counts) == (other.kind, other.order, other.counts)
        assert other.measured == pytest.approx(one.measured, rel=1e-6)
        assert other.local == pytest.approx(one.local, rel=1e-6)
