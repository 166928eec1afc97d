"""Hidden units that give one number at every step: it goes into what reads them, from the first step on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.fxprune.channels.layers import Net
from tests.fxprune.channels.test_recurrent import GATES, finalized, left_of, read, suffixes

X = torch.randn(2, 5, 6)
LAYERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "tanh": (nn.RNN, {}), "relu": (nn.RNN, {"nonlinearity": "relu"}), "gru": (nn.GRU, {}), "lstm": (nn.LSTM, {})
}  # fmt: skip


def bias_alone(layer: Any, units: range, suffix: str = "", *, forget: bool = True) -> None:
    """Leave units biases, such that gates let nothing of the states before through where `forget`."""
    count, gates = layer.hidden_size, GATES[type(layer)]
    rows = [gate * count + unit for gate in range(gates) for unit in units]
    with torch.no_grad():
        for kind in ("weight_ih", "weight_hh"):
            getattr(layer, kind + suffix)[rows] = 0
        getattr(layer, "weight_hh" + suffix)[:, list(units)] = 0
        if gates > 1 and forget:  # the gate that keeps what was: z of a GRU, f of an LSTM, both second
            getattr(layer, "bias_ih" + suffix)[[count + unit for unit in units]] = -2000.0


@pytest.mark.parametrize("kind", LAYERS)
def test_units_of_layers_that_give_one_number_go(kind: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind][0](6, 8, num_layers=2, bidirectional=True, batch_first=True, **LAYERS[kind][1])
    for suffix in suffixes(layer):
        bias_alone(layer, range(2, 6), suffix)
    final = finalized(read(layer, 16), X)
    assert all(left_of(final, f"layer.weight_hh{suffix}", 1) == [0, 1, 6, 7] for suffix in suffixes(layer))


def steps(self: Any, x: Tensor) -> Tensor:
    """The states of a cell behind every step."""
    state, seen = x.new_zeros(x.shape[0], 8), []
    for step in x.unbind(1):
        state = self.cell(step, state)
        seen.append(state)
    return torch.stack(seen, 1)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_units_of_cells_that_give_one_number_go_from_a_loop(nonlinearity: str) -> None:
    torch.manual_seed(1)
    cell = nn.RNNCell(6, 8, nonlinearity=nonlinearity)
    bias_alone(cell, range(3))
    final = finalized(Net(lambda self, x: self.out(steps(self, x)), cell=cell, out=nn.Linear(8, 3)), X)
    assert left_of(final, "cell.weight_hh", 1) == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_units_that_carry_something_on_give_another_number_at_every_step_and_stay(kind: str) -> None:
    torch.manual_seed(2)
    layer = LAYERS[kind][0](6, 8, batch_first=True)
    bias_alone(layer, range(4), "_l0", forget=False)
    final = finalized(read(layer, 8), X)
    assert final.get_parameter("layer.weight_hh_l0").shape[1] == 8
    assert final.plan is not None
    stayed = {i for name, _, at, _ in final.plan.stayed if name == "layer.weight_ih_l0" for i in at}
    assert stayed == {gate * 8 + unit for gate in range(GATES[type(layer)]) for unit in range(4)}


def test_a_unit_that_starts_elsewhere_stays_where_another_reads_it() -> None:
    torch.manual_seed(3)
    layer: Any = nn.RNN(6, 8, batch_first=True)
    bias_alone(layer, range(4), "_l0")
    with torch.no_grad():
        layer.weight_hh_l0[7, 1] = 0.5  # zero at the first step
        layer.bias_ih_l0[2], layer.bias_hh_l0[2] = 0.5, -0.5
        layer.weight_hh_l0[7, 2] = 0.5  # zero at every step
        layer.weight_hh_l0[3, 0] = 0.5  # one number from the second step on
    final = finalized(read(layer, 8), X)
    assert left_of(final, "layer.weight_hh_l0", 1) == [0, 1, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("bias", [0.3, -0.3])
def test_layers_behind_units_of_one_number_are_constants(bias: float) -> None:
    torch.manual_seed(4)
    cell: Any = nn.RNNCell(6, 8, nonlinearity="relu")
    layer: Any = nn.RNN(5, 4, batch_first=True)
    between = nn.Linear(8, 5)
    bias_alone(cell, range(3))
    with torch.no_grad():
        cell.bias_ih[:3], cell.bias_hh[:3] = bias, 0
        between.weight[:, 3:] = 0
        layer.weight_ih_l0[2:], layer.weight_hh_l0[2:], layer.weight_hh_l0[:, 2:] = 0, 0, 0

    model = Net(
        lambda self, x: self.out(self.layer(self.between(steps(self, x)))[1].mean(0)),
        cell=cell, between=between, layer=layer, out=nn.Linear(4, 3),
    )  # fmt: skip
    final = finalized(model, X)
    assert final.get_parameter("cell.weight_ih").shape == (1, 6)
    assert final.get_parameter("between.weight").shape == (1, 1)
    assert final.get_parameter("layer.weight_ih_l0").shape == (2, 1)


def test_last_states_of_one_number_in_all_layers_are_constants() -> None:
    torch.manual_seed(5)
    layer: Any = nn.RNN(6, 8, num_layers=2, batch_first=True)
    for suffix in suffixes(layer):
        bias_alone(layer, range(3), suffix)
    with torch.no_grad():
        for bias, number in ((layer.bias_ih_l0, 0.5), (layer.bias_ih_l1, 0.25)):
            bias[:3] = number
        layer.bias_hh_l0[:3], layer.bias_hh_l1[:3] = 0, torch.tensor([0.25, 0.25, 0.5])
    model = Net(lambda self, x: self.out(self.layer(x)[1].mean(0)), layer=layer, out=nn.Linear(8, 3))
    final = finalized(model, X)
    assert left_of(final, "layer.weight_hh_l0", 1) == [2, 3, 4, 5, 6, 7]  # another number in the second layer
