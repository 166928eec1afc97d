"""Constants and channels that meet axes of space, steps or positions: borders of zeros, inputs without channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxprune
from tests.fxprune.channels.exactness import EXACT, error
from tests.fxprune.channels.layers import Net, zero_rows


def finalized(model: nn.Module, *shape: int) -> fxprune.TracedModule:
    """The model finalized, after a comparison of the outputs at two batch sizes."""
    model.double().eval()
    x = torch.randn(2, *shape).double()
    final = fxprune.finalize(fxprune.trace(model, (x,), modes=("eval",)), align=1, verify=False)
    with torch.no_grad():
        for batch in (2, 5):
            x = torch.randn(batch, *shape).double()
            assert error(model(x), final(x)) < EXACT
    return final


def gated(self: Any, x: Tensor) -> Tensor:
    return self.out(functional.glu(functional.pad(self.first(x), [1, 1, 1, 1]), 1))


def expanded(self: Any, x: Tensor) -> Tensor:
    line = functional.pad(self.first(x.mean(3, keepdim=True)), [0, 0, 1, 1])
    return self.out(line.expand_as(self.beside(functional.pad(x, [0, 0, 1, 1]))))


@pytest.mark.parametrize(("forward", "width"), [(gated, 2), (expanded, 4)])
def test_constants_with_a_border_of_zeros_are_no_constants(forward: Callable[..., Tensor], width: int) -> None:
    model = Net(forward, first=nn.Conv2d(3, 4, 1), beside=nn.Conv2d(3, 4, 1), out=nn.Conv2d(width, 5, 1))
    zero_rows(model.first, 0, 1, 2)
    finalized(model, 3, 4, 4)


@pytest.mark.parametrize("padded", ["key", "value"])
def test_keys_and_values_with_a_border_of_zeros_are_not_the_same_for_all_positions(padded: str) -> None:
    def attend(self: Any, x: Tensor) -> Tensor:
        constant, other = (functional.pad(layer(x), [0, 0, 1, 1]) for layer in (self.first, self.second))
        key, value = (constant, other) if padded == "key" else (other, constant)
        return self.out(functional.scaled_dot_product_attention(self.query(x), key, value))

    layers = {name: nn.Linear(3, 4) for name in ("first", "second", "query")}
    model = Net(attend, **layers, out=nn.Linear(4, 5))
    zero_rows(model.first, 0, 1, 2)
    finalized(model, 5, 3)


def test_a_gate_over_space_leaves_the_channels() -> None:
    model = Net(
        lambda self, x: self.out(functional.glu(self.first(x), 2)), first=nn.Conv2d(3, 4, 1), out=nn.Conv2d(4, 2, 1)
    )
    zero_rows(model.first, 0, 3)
    assert finalized(model, 3, 4, 4).plan.kept["first.weight"][0].tolist() == [1, 2]
    finalized(Net(lambda self, x: functional.glu(self.first(x), 2), first=nn.Conv2d(3, 4, 1)), 3, 4, 4)


def test_the_steps_of_a_recurrent_layer_stay() -> None:
    model = Net(
        lambda self, x: self.rnn(self.first(x))[0],
        first=nn.Conv1d(3, 4, 1), rnn=nn.LSTM(6, 2, batch_first=True),
    )  # fmt: skip
    zero_rows(model.first, 0, 2, bias=True)
    assert len(finalized(model, 3, 6).plan.kept["first.weight"][0]) == 4


def test_constants_that_a_layer_reads_along_space_do_not_fold() -> None:
    model = Net(lambda self, x: self.out(1 - self.first(x)), first=nn.Conv1d(3, 2, 1), out=nn.Linear(6, 4, bias=False))
    zero_rows(model.first, 0, 1, bias=True)
    assert "out.bias" not in finalized(model, 3, 6).state_dict()


def test_a_constant_times_a_vector_is_a_number_for_each_sample() -> None:
    model = Net(
        lambda self, x: self.out((self.first(x) @ self.row.clone()).unsqueeze(1)),
        first=nn.Linear(3, 4), row=nn.Parameter(torch.zeros(4)), out=nn.Linear(1, 2),
    )  # fmt: skip
    finalized(model, 3)


def test_a_layer_whose_result_is_written_and_not_read_leaves() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.unread(x).mul_(0.5)
        return self.out(x)

    final = finalized(Net(forward, unread=nn.Conv1d(3, 4, 3), out=nn.Conv1d(3, 2, 1)), 3, 8)
    assert list(final.state_dict()) == ["out.weight", "out.bias"]


def test_shared_keys_without_channels_meet_queries_with_channels() -> None:
    def attend(self: Any, x: Tensor) -> Tensor:
        query = self.query(x).view(-1, 5, 4, 2).transpose(1, 2)
        key = functional.linear(x, torch.cat([self.row, self.row])).view(-1, 5, 1, 2).transpose(1, 2)
        value = self.value(x).view(-1, 5, 1, 2).transpose(1, 2)
        return functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    model = Net(attend, query=nn.Linear(3, 8), value=nn.Linear(3, 2), row=nn.Parameter(torch.randn(1, 3)))
    finalized(model, 5, 3)


def repeated_column(self: Any, x: Tensor) -> Tensor:
    weights = functional.softmax(x[..., :1], -1)
    return self.out(torch.einsum("bqk,bkd->bqd", weights, self.first(x)))


def masked_row(self: Any, x: Tensor) -> Tensor:
    logits = (x @ x.mT).masked_fill(torch.eye(5)[:, :1].bool(), float("-inf"))
    return self.out(torch.ops.aten._safe_softmax.default(logits, -1) @ self.first(x))


@pytest.mark.parametrize("forward", [repeated_column, masked_row])
def test_constants_pass_only_weights_that_sum_to_one(forward: Callable[..., Tensor]) -> None:
    model = Net(forward, first=nn.Linear(3, 4), out=nn.Linear(4, 2))
    zero_rows(model.first, 0, 1, 2)
    finalized(model, 5, 3)


def rounded_parameter(self: Any, x: Tensor) -> Tensor:
    return functional.linear(self.first(x), self.out.weight.half().double())


def rounded_value(self: Any, x: Tensor) -> Tensor:
    return self.out(self.first(x).half().double())


@pytest.mark.parametrize("forward", [rounded_parameter, rounded_value])
def test_constants_are_rounded_where_the_graph_rounds(forward: Callable[..., Tensor]) -> None:
    model = Net(forward, first=nn.Linear(3, 4), out=nn.Linear(4, 2))
    zero_rows(model.first, 0, 1, 2)
    assert len(finalized(model, 3).plan.kept["first.weight"][0]) == 1


@pytest.mark.parametrize(("size", "beta"), [(1, 1), (5, 0.5)])
def test_a_bias_that_is_not_added_row_by_row_stays(size: int, beta: float) -> None:
    model = Net(
        lambda self, x: torch.addmm(self.bias, self.first(x), self.table, beta=beta),
        first=nn.Linear(3, 4), table=nn.Parameter(torch.randn(4, 5)), bias=nn.Parameter(torch.randn(size)),
    )  # fmt: skip
    zero_rows(model.first, 0, 1, 2)
    final = finalized(model, 3)
    assert torch.equal(final.bias, model.bias)
    assert len(final.plan.kept["first.weight"][0]) == 1


def test_the_only_row_of_a_table_is_looked_up_for_every_token() -> None:
    model = Net(
        lambda self, x: self.out(self.table[(x > 9).long()].sum(1)) + x[:, :1],
        table=nn.Parameter(torch.randn(1, 4)), out=nn.Linear(4, 2),
    )  # fmt: skip
    finalized(model, 3)
