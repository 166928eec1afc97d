"""Hidden units of recurrent layers: those whose state stays zero go, and those that nothing reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fxprune
from fxprune.errors import CaptureError, SampleError
from fxprune.graph.plan import ChannelPlan
from tests.fxprune.channels.exactness import EXACT, count, error
from tests.fxprune.channels.layers import Net

KINDS: list[type[nn.RNNBase]] = [nn.LSTM, nn.GRU, nn.RNN]
CELLS: list[type[nn.RNNCellBase]] = [nn.LSTMCell, nn.GRUCell, nn.RNNCell]
GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1, nn.LSTMCell: 4, nn.GRUCell: 3, nn.RNNCell: 1}
CANDIDATE = {nn.LSTM: 2, nn.GRU: 2, nn.RNN: 0, nn.LSTMCell: 2, nn.GRUCell: 2, nn.RNNCell: 0}
UNITS = 16


def zero_units(layer: Any, units: Sequence[int], suffix: str = "_l0", *, gates: Sequence[int] | None = None) -> None:
    """Zero rows and biases of units, in some gates or in all."""
    gates = range(GATES[type(layer)]) if gates is None else gates
    rows = [gate * layer.hidden_size + unit for gate in gates for unit in units]
    with torch.no_grad():
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            if hasattr(layer, kind + suffix):
                getattr(layer, kind + suffix)[rows] = 0


def suffixes(layer: nn.RNNBase) -> list[str]:
    ways = ("", "_reverse") if layer.bidirectional else ("",)
    return [f"_l{number}{way}" for number in range(layer.num_layers) for way in ways]


def zero_random_units(layer: nn.RNNBase, *, gates: Sequence[int] | None = None) -> None:
    """Half of the units of every layer and direction, others in each."""
    for suffix in suffixes(layer):
        zero_units(layer, torch.randperm(layer.hidden_size)[: layer.hidden_size // 2].tolist(), suffix, gates=gates)


def finalized(
    model: nn.Module, *inputs: Tensor, batches: Sequence[int] = (1, 2, 5), modes: tuple[str, ...] = ("eval",)
) -> fxprune.TracedModule:
    """The finalized model in float64, compared with the model as it was at several batch sizes (the first axis)."""
    model = model.double().eval()
    inputs = tuple(x.double() for x in inputs)
    traced = fxprune.trace(model, inputs, modes=modes).eval()
    final = fxprune.finalize(traced, align=1)
    for batch in batches:
        again = tuple(torch.randn(batch, *x.shape[1:]).double() for x in inputs)
        with torch.no_grad():
            assert error(model(*again), final(*again)) < EXACT
    return final


def read(layer: nn.RNNBase, outputs: int) -> Net:
    """A layer over random features, whose outputs a linear layer reads."""
    return Net(lambda self, x: self.out(self.layer(x)[0]), layer=layer, out=nn.Linear(outputs, 3))


def left_of(final: fxprune.TracedModule, name: str, axis: int = 0) -> list[int]:
    """The kept indices."""
    assert final.plan is not None
    return final.plan.kept[name][axis].tolist()


X = torch.randn(2, 5, 6)


@pytest.mark.parametrize("gates", ["all", "candidate"])
@pytest.mark.parametrize("kind", KINDS)
def test_units_that_stay_zero_leave_layers_of_both_directions(kind: type[nn.RNNBase], gates: str) -> None:
    torch.manual_seed(0)
    layer = kind(6, UNITS, num_layers=2, bidirectional=True, batch_first=True, dropout=0.2)
    zero_random_units(layer, gates=None if gates == "all" else [CANDIDATE[kind]])
    model = read(layer, 2 * UNITS)
    final = finalized(model, X, modes=("train", "eval"))
    assert count(final) <= 0.45 * count(model)
    assert {final.get_parameter(f"layer.weight_hh{s}").shape[1] for s in suffixes(layer)} == {UNITS // 2}
    final.train()
    final(X.double()).sum().backward()
    assert all(p.grad is not None for p in final.parameters())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.LSTM, {"bias": False}), (nn.GRU, {"bias": False}), (nn.RNN, {"bias": False}),
        (nn.RNN, {"nonlinearity": "relu"}), (nn.GRU, {"num_layers": 3}), (nn.LSTM, {"bidirectional": True}),
    ],
)  # fmt: skip
def test_units_leave_layers_of_all_options(kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    layer = kind(6, UNITS, batch_first=True, **options)
    zero_random_units(layer)
    model = read(layer, UNITS * (2 if layer.bidirectional else 1))
    assert count(finalized(model, X)) <= 0.45 * count(model)


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_any_number_of_steps_gives_the_same(steps: int) -> None:
    """torch captures a recurrent layer for the number of steps of the sample alone."""
    torch.manual_seed(2)
    layer = nn.GRU(6, UNITS, batch_first=True)
    zero_random_units(layer)
    model = read(layer, UNITS)
    assert count(finalized(model, torch.randn(2, steps, 6))) <= 0.45 * count(model)


def test_a_unit_may_read_others_that_stay_zero() -> None:
    layer = nn.LSTM(6, UNITS, batch_first=True)
    zero_units(layer, range(8), gates=[2])
    with torch.no_grad():
        layer.weight_hh_l0[2 * UNITS : 2 * UNITS + 8, :8] = 1  # those that go read each other
    assert left_of(finalized(read(layer, UNITS), X), "layer.weight_hh_l0", 1) == list(range(8, UNITS))
    with torch.no_grad():
        layer.weight_hh_l0[2 * UNITS, UNITS - 1] = 1  # one of them reads another, and all others read it
    assert len(left_of(finalized(read(layer, UNITS), X), "layer.weight_hh_l0", 1)) == UNITS


@pytest.mark.parametrize("kind", KINDS)
def test_a_unit_whose_gates_are_masked_in_part_stays_and_the_plan_says_why(kind: type[nn.RNNBase]) -> None:
    layer = kind(6, UNITS, batch_first=True)
    rows = [unit + CANDIDATE[kind] * UNITS for unit in range(4)]
    with torch.no_grad():
        layer.weight_ih_l0[rows] = 0
        layer.weight_hh_l0[rows] = 0  # not the biases
    final = finalized(read(layer, UNITS), X)
    assert len(left_of(final, "layer.weight_hh_l0", 1)) == UNITS
    assert final.plan is not None
    stayed = [(name, axis, index) for name, axis, index, _ in final.plan.stayed]
    assert ("layer.weight_ih_l0", 0, rows) in stayed
    assert all("reads it, and it is not constant there" in why for *_, why in final.plan.stayed)


def test_biases_that_cancel_are_zero_where_they_are_added() -> None:
    for kind, left in ((nn.LSTM, 12), (nn.RNN, 12), (nn.GRU, 16)):
        layer = kind(6, UNITS, batch_first=True)
        zero_units(layer, range(4))
        rows = slice(CANDIDATE[kind] * UNITS, CANDIDATE[kind] * UNITS + 4)
        with torch.no_grad():
            layer.bias_ih_l0[rows], layer.bias_hh_l0[rows] = 0.3, -0.3  # a GRU scales the second
        assert len(left_of(finalized(read(layer, UNITS), X), "layer.weight_hh_l0", 1)) == left


def test_units_that_only_themselves_read_go() -> None:
    model = read(nn.LSTM(6, UNITS, batch_first=True), UNITS)
    with torch.no_grad():
        model.out.weight[:, :6] = 0
        model.layer.weight_hh_l0.unflatten(0, (4, UNITS))[:, 6:, :6] = 0
    assert left_of(finalized(model, X), "layer.weight_hh_l0", 1) == list(range(6, UNITS))


def test_directions_keep_equally_many_units() -> None:
    layer = nn.GRU(6, UNITS, bidirectional=True, batch_first=True)
    zero_units(layer, range(6))
    zero_units(layer, range(4, 14), "_l0_reverse")
    final = finalized(read(layer, 2 * UNITS), X)
    kept = [left_of(final, f"layer.weight_hh{s}", 1) for s in suffixes(layer)]
    assert [len(each) for each in kept] == [10, 10]
    assert kept[0] == list(range(6, UNITS))
    assert set(kept[1]) > {0, 1, 2, 3, 14, 15}
    assert "kept so that the layers and directions of a recurrent call have equally many units" in str(
        final.plan.explain() if final.plan else ""
    )


@pytest.mark.parametrize("reads", [lambda output, last: last[-1], lambda output, last: output[..., :UNITS]])
def test_a_direction_that_nothing_reads_has_as_many_units_as_the_other(reads: Callable[..., Tensor]) -> None:
    """They are there for their number: what they read goes all the same."""
    layer = nn.GRU(6, UNITS, bidirectional=True, batch_first=True)
    model = Net(lambda self, x: self.out(reads(*self.layer(x))), layer=layer, out=nn.Linear(UNITS, 3)).double().eval()
    traced = fxprune.trace(model, (X.double(),))
    report = fxprune.prune.channels(traced, 0.5, round_to=1)
    final = fxprune.finalize(traced.eval(), align=1)
    assert final.plan is not None
    assert report.macs == final.plan.macs
    assert {final.get_parameter(f"layer.weight_hh{s}").shape for s in suffixes(layer)} == {(3 * 8, 8)}
    x = torch.randn(5, 5, 6).double()
    with torch.no_grad():
        assert error(traced(x), final(x)) < EXACT


def test_what_the_model_returns_keeps_the_units_of_all_layers() -> None:
    layer = nn.LSTM(6, UNITS, num_layers=2, batch_first=True)
    zero_random_units(layer)
    final = finalized(Net(lambda self, x: self.layer(x)[0], layer=layer), X)
    assert count(final) == count(layer)
    assert final.plan is not None
    assert {why for *_, why in final.plan.stayed} == {
        "pinned by `output` (output): the model returns it",
        "kept so that the layers and directions of a recurrent call have equally many units",
    }


LAST_STATES: dict[str, Callable[[Tensor], Tensor]] = {
    "select": lambda h: torch.cat([h[-2], h[-1]], 1),
    "unbind": lambda h: torch.cat(h.unbind(0)[2:], 1),
    "view": lambda h: h.view(2, 2, -1, UNITS)[-1].transpose(0, 1).flatten(1),
    "slice": lambda h: h[-2:].transpose(0, 1).flatten(1),
    "mean": lambda h: torch.cat([h.mean(0), h.amax(0)], 1),
}


@pytest.mark.parametrize("way", LAST_STATES)
def test_the_last_states_are_read_in_any_way(way: str) -> None:
    torch.manual_seed(3)
    layer = nn.GRU(6, UNITS, num_layers=2, bidirectional=True, batch_first=True)
    if way in ("select", "unbind"):
        zero_random_units(layer)
    else:  # where all layers are read together, the same units must be zero in all
        for suffix in suffixes(layer):
            zero_units(layer, range(3, 11), suffix)
    model = Net(lambda self, x: self.out(LAST_STATES[way](self.layer(x)[1])), layer=layer, out=nn.Linear(2 * UNITS, 3))
    assert count(finalized(model, X)) <= 0.45 * count(model)


def test_cell_states_carry_the_units_of_their_layer() -> None:
    layer = nn.LSTM(6, UNITS, num_layers=2, batch_first=True)
    zero_units(layer, range(8), "_l0")
    zero_units(layer, range(4, 12), "_l1")

    def forward(self: Net, x: Tensor) -> Tensor:
        output, (hidden, cell) = self.layer(x)
        return self.out(torch.cat([output[:, -1], hidden[0], cell[1], cell[0]], 1))

    final = finalized(Net(forward, layer=layer, out=nn.Linear(4 * UNITS, 3)), X)
    first, second = list(range(8, UNITS)), [0, 1, 2, 3, 12, 13, 14, 15]
    columns = [second, first, second, first]
    assert left_of(final, "out.weight", 1) == [UNITS * i + unit for i, own in enumerate(columns) for unit in own]


def test_a_projection_has_units_of_its_own() -> None:
    layer = nn.LSTM(6, UNITS, num_layers=2, bidirectional=True, proj_size=5, batch_first=True)
    zero_random_units(layer, gates=[2])
    with torch.no_grad():
        for suffix in suffixes(layer):
            getattr(layer, f"weight_hr{suffix}")[torch.randperm(5)[:2]] = 0
    final = finalized(read(layer, 10), X, modes=("train", "eval"))
    for suffix in suffixes(layer):
        assert final.get_parameter(f"layer.weight_hr{suffix}").shape == (3, UNITS // 2)
        assert final.get_parameter(f"layer.weight_hh{suffix}").shape == (4 * UNITS // 2, 3)


@pytest.mark.parametrize("gates", ["all", "candidate"])
@pytest.mark.parametrize("kind", CELLS)
def test_units_of_cells_leave_a_loop_that_starts_at_zero(kind: type[nn.RNNCellBase], gates: str) -> None:
    def forward(self: Net, x: Tensor) -> Tensor:
        state, seen = None, []
        for step in x.unbind(1):
            state = self.cell(step, state)
            seen.append(state[0] if isinstance(state, tuple) else state)
        return self.out(torch.stack(seen, 1))

    cell = kind(6, UNITS)
    zero_units(cell, range(3, 11), "", gates=None if gates == "all" else [CANDIDATE[kind]])
    model = Net(forward, cell=cell, out=nn.Linear(UNITS, 3))
    final = finalized(model, X, modes=("train", "eval"))
    assert left_of(final, "cell.weight_hh", 1) == [0, 1, 2, *range(11, UNITS)]
    assert count(final) <= 0.45 * count(model)


def test_zeros_that_several_layers_start_with_are_cut_for_each() -> None:
    def forward(self: Net, x: Tensor) -> Tensor:
        zeros = x.new_zeros(1, x.shape[0], UNITS)
        return self.out(self.second(self.first(x, zeros)[0], zeros)[0])

    first, second = nn.GRU(6, UNITS, batch_first=True), nn.GRU(UNITS, UNITS, batch_first=True)
    zero_units(first, range(8))
    zero_units(second, range(2, 14))
    final = finalized(Net(forward, first=first, second=second, out=nn.Linear(UNITS, 3)), X)
    assert left_of(final, "first.weight_hh_l0", 1) == list(range(8, UNITS))
    assert left_of(final, "second.weight_hh_l0", 1) == [0, 1, 14, 15]


@pytest.mark.parametrize("rows", [1, 2])
def test_a_learned_initial_state_keeps_units_until_it_is_zero_there(rows: int) -> None:
    def forward(self: Net, x: Tensor) -> Tensor:
        return self.out(self.layer(x, self.start.expand(rows, x.shape[0], UNITS))[0])

    layer = nn.GRU(6, UNITS, num_layers=rows, batch_first=True)
    for suffix in suffixes(layer):
        zero_units(layer, range(8), suffix)
    model = Net(forward, layer=layer, out=nn.Linear(UNITS, 3), start=nn.Parameter(torch.randn(rows, 1, UNITS)))
    assert count(finalized(model, X)) == count(model)
    with torch.no_grad():
        model.start[..., :8] = 0
    final = finalized(model, X)
    assert final.get_parameter("start").shape == (rows, 1, 8)
    assert left_of(final, "layer.weight_hh_l0", 1) == list(range(8, UNITS))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.RNN, pytest.param(nn.GRU, marks=pytest.mark.slow)])
def test_a_computed_initial_state_does_not_keep_units_that_carry_nothing_of_it_on(kind: type[nn.RNNBase]) -> None:
    """What an RNN, or the hidden state of an LSTM, starts with is read at the first step alone."""

    def forward(self: Net, x: Tensor) -> Tensor:
        start = self.begin(x[:, 0]).tanh().expand(2, x.shape[0], UNITS)
        state = (start, torch.zeros_like(start)) if kind is nn.LSTM else start
        return self.out(self.layer(x, state)[0])

    layer = kind(6, UNITS, num_layers=2, batch_first=True)
    for suffix in suffixes(layer):
        zero_units(layer, range(8), suffix, gates=[CANDIDATE[kind]])
    model = Net(forward, layer=layer, begin=nn.Linear(6, UNITS), out=nn.Linear(UNITS, 3))
    assert count(finalized(model, X)) == count(model)  # other units read it then
    with torch.no_grad():
        for suffix in suffixes(layer):
            getattr(layer, f"weight_hh{suffix}")[:, :8] = 0
    final = finalized(model, X)
    left = list(range(UNITS)) if kind is nn.GRU else list(range(8, UNITS))
    assert left_of(final, "begin.weight") == left
    assert left_of(final, "layer.weight_hh_l1", 1) == left


@pytest.mark.parametrize("rows", [1, 2])
def test_a_given_initial_state_keeps_its_size_and_is_read_where_units_stay(rows: int) -> None:
    def forward(self: Net, x: Tensor, hidden: Tensor, cell: Tensor) -> Tensor:
        return self.out(self.layer(x, (hidden.transpose(0, 1), cell.transpose(0, 1)))[0])

    layer = nn.LSTM(6, UNITS, num_layers=rows, batch_first=True)
    for suffix in suffixes(layer):
        zero_units(layer, range(8), suffix)
    model = Net(forward, layer=layer, out=nn.Linear(UNITS, 3))
    inputs = X, torch.randn(2, rows, UNITS), torch.randn(2, rows, UNITS)
    final = finalized(model, *inputs)  # what a state starts with decays, and is read
    assert count(final) == count(model)
    assert final.plan is not None
    assert all("reads it, and it is not constant there" in why for *_, why in final.plan.stayed)
    unread = range(3, 11)
    with torch.no_grad():
        model.out.weight[:, unread] = 0
        for suffix in suffixes(layer):
            getattr(layer, f"weight_hh{suffix}")[:, unread] = 0
        if rows == 2:
            layer.weight_ih_l1[:, unread] = 0
    final = finalized(model, *inputs, modes=("train", "eval"))
    assert left_of(final, "layer.weight_hh_l0", 1) == [0, 1, 2, *range(11, UNITS)]
    final.train()(*(x.double() for x in inputs)).sum().backward()
    report = fxprune.prune.channels(traced := fxprune.trace(model, tuple(x.double() for x in inputs)), 0.5, round_to=1)
    assert fxprune.finalize(traced, align=1).plan.macs == report.macs  # type: ignore[union-attr]


def test_a_picked_initial_state_is_stored_loaded_and_exported(tmp_path: Path) -> None:
    model = Net(lambda self, x, h: self.out(self.cell(x, h)), cell=nn.GRUCell(6, UNITS), out=nn.Linear(UNITS, 3)).eval()
    inputs = torch.randn(2, 6), torch.randn(2, UNITS)
    traced = fxprune.trace(model, inputs)
    fxprune.prune.channels(traced, 0.5, round_to=1)
    final = fxprune.finalize(traced.eval(), align=1)
    assert final.get_parameter("cell.weight_hh").shape == (3 * UNITS // 2, UNITS // 2)
    torch.testing.assert_close(final(*inputs), traced(*inputs))
    fxprune.save(final, tmp_path / "model.fxp")
    for loaded in (fxprune.load(tmp_path / "model.fxp"), fxprune.load(tmp_path / "model.fxp", model)):
        assert torch.equal(loaded.eval()(*inputs), final(*inputs))
    assert fxprune.export.to_onnx(final, tmp_path / "model.onnx").comparison.ok
    again = fxprune.finalize(final, align=1)
    assert torch.equal(again(*inputs), final(*inputs))


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_decoder_starts_with_the_states_of_an_encoder(kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    def forward(self: Net, x: Tensor) -> Tensor:
        _, state = self.encoder(x)
        return self.out(self.decoder(x, state)[0])

    layers = {name: kind(6, UNITS, batch_first=True, **options) for name in ("encoder", "decoder")}
    for suffix in suffixes(layers["encoder"]):
        units = torch.randperm(UNITS)[:8].tolist()
        for layer in layers.values():
            zero_units(layer, units, suffix)
    model = Net(forward, **layers, out=nn.Linear(UNITS * (2 if "bidirectional" in options else 1), 3))
    assert count(finalized(model, X)) <= 0.45 * count(model)


def test_all_units_but_one_can_go() -> None:
    layer = nn.GRU(6, UNITS, num_layers=2, batch_first=True)
    for suffix in suffixes(layer):
        zero_units(layer, range(UNITS), suffix)
    final = finalized(read(layer, UNITS), X)
    assert final.get_parameter("layer.weight_hh_l1").shape == (3, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_macs_of_a_group_are_those_that_finalize_leaves(kind: type[nn.RNNBase]) -> None:
    """The part that reads the state grows with the square of the units."""
    traced = fxprune.trace(read(kind(6, UNITS, batch_first=True), UNITS), (X,))
    report = fxprune.prune.channels(traced, 4, round_to=1)
    plan = fxprune.finalize(traced, align=1).plan
    gates, left = GATES[kind], UNITS - 4
    assert plan is not None
    assert report.macs == plan.macs
    assert plan.macs == tuple(5 * n * (gates * (6 + n) + 3) for n in (UNITS, left))


class Tagger(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], units: int = 32) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.layers = kind(16, units, num_layers=2, bidirectional=True, batch_first=True, dropout=0.1)
        self.head = nn.Linear(2 * units, 4)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.layers(self.words(words))[0])


class Recognizer(nn.Module):
    """Convolutions over an image, and a recurrent layer over its columns."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d((2, 1)),
        )  # fmt: skip
        self.layers = kind(32, 32, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = self.convolutions(x)
        return self.head(self.layers(features.flatten(1, 2).transpose(1, 2))[0])


@pytest.mark.parametrize("case", [pytest.param("tagger LSTM", marks=pytest.mark.slow), "tagger GRU", "recognizer LSTM"])
def test_a_network_is_cut_to_half_trained_finalized_exported_and_written_back(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    what, name = case.split()
    kind: type[nn.RNNBase] = getattr(nn, name)
    model: nn.Module = Tagger(kind) if what == "tagger" else Recognizer(kind)
    x = torch.randint(0, 20, (4, 12)) if what == "tagger" else torch.randn(4, 1, 8, 24)
    labels = x % 4 if what == "tagger" else torch.randint(0, 4, (4, 12))
    traced = fxprune.trace(model, (x,))
    groups = [g for g in fxprune.channel_groups(traced) if g.name.startswith("layers.")]
    assert [g.size for g in groups if g.reason is None] == [32] * 4
    report = fxprune.prune.channels(traced, macs=0.5)
    assert report.macs[1] <= 0.5 * report.macs[0]
    optimizer = torch.optim.Adam(traced.parameters(), 1e-3)
    fxprune.clip_gradients(optimizer, max_norm=1.0)
    traced.train()
    for _ in range(100):
        optimizer.zero_grad()
        functional.cross_entropy(traced(x).flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
    final = fxprune.finalize(traced.eval())
    assert final.plan is not None
    assert final.plan.macs == report.macs
    torch.testing.assert_close(final(x), traced(x), rtol=1e-4, atol=1e-5)
    assert fxprune.export.to_onnx(final, tmp_path / "model.onnx").comparison.ok
    operators = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert operators.count(name) == 2
    written: Any = fxprune.write_back(final, model)
    units = written.layers.hidden_size
    assert units == final.get_parameter("layers.weight_hh_l1_reverse").shape[1] < 32
    assert written.head.in_features == 2 * units
    assert torch.equal(written.eval()(x), final(x))


def test_a_plan_gives_another_network_of_the_kind_the_same_sizes() -> None:
    layer = nn.LSTM(6, UNITS, num_layers=2, bidirectional=True, batch_first=True)
    zero_random_units(layer)
    final = finalized(read(layer, 2 * UNITS), X)
    assert final.plan is not None
    other = fxprune.trace(
        read(nn.LSTM(6, UNITS, 2, bidirectional=True, batch_first=True), 2 * UNITS).double(), (X.double(),)
    )
    fxprune.channels.impose(other, ChannelPlan.from_json(final.plan.to_json()))
    other.load_state_dict(final.state_dict())
    assert torch.equal(other.eval()(X.double()), final(X.double()))


@pytest.mark.parametrize("with_states", [False, True])
def test_packed_sequences_are_refused_by_name(with_states: bool) -> None:
    def forward(self: Net, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True)
        start = (x.new_zeros(1, 2, 8), x.new_zeros(1, 2, 8)) if with_states else None
        return pad_packed_sequence(self.layer(packed, start)[0], batch_first=True)[0]

    model = Net(forward, layer=nn.LSTM(6, 8, batch_first=True))
    with pytest.raises(CaptureError, match="padded tensors instead of packed sequences"):
        fxprune.trace(model, (X, torch.tensor([5, 3])))
    with pytest.raises(SampleError, match="an input is a packed sequence"):
        fxprune.trace(nn.LSTM(6, 8), (pack_padded_sequence(X, torch.tensor([5, 3]), batch_first=True),))


def test_more_cells_stay_than_projected_units_as_torch_needs() -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(6, 8, proj_size=4, batch_first=True).double()
    with torch.no_grad():
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            layer.get_parameter(name).unflatten(0, (4, 8))[:, :5] = 0
    model = Net(lambda self, x: self.head(self.rnn(x)[0]), rnn=layer, head=nn.Linear(4, 2).double()).eval()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    final = fxprune.finalize(fxprune.trace(model, x, modes=("eval",)), align=1)
    assert final.get_parameter("rnn.weight_hr_l0").shape == (4, 5)
    assert (final(x) - model(x)).abs().max() < 1e-12
    assert final.plan is not None
    assert "more cells than projected units" in final.plan.explain()
