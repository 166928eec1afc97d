"""Tensors that are computed whenever they are read act as plain ones, and masked weights are never all held."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fxprune
from fxprune.borrowing import share_memory
from fxprune.errors import AnalysisWarning
from fxprune.graph import on_demand, working_memory
from fxprune.graph.on_demand import Latest, OnDemand, masked_on_demand
from tests.random_networks import network

VALUES = torch.arange(12.0).reshape(3, 4) - 5
KEPT = torch.tensor([[True], [False], [True]]).expand(3, 4)


@pytest.fixture(autouse=True)
def _of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_demand, "LEAST", 0)


def made(latest: Latest | None = None, values: torch.Tensor = VALUES) -> OnDemand:
    found = masked_on_demand(values, lambda: KEPT, latest or Latest(values.nbytes))
    assert isinstance(found, OnDemand)
    return found


def test_operators_give_what_they_give_of_plain_tensors() -> None:
    own, want = made(), VALUES * KEPT
    assert own.sum() == want.sum()
    assert torch.equal(torch.ones(2, 4) @ own.T, torch.ones(2, 4) @ want.T)
    assert torch.equal(own.movedim(1, 0)[1:].flatten(), want.movedim(1, 0)[1:].flatten())
    assert own.tolist() == want.tolist()
    assert np.array_equal(own.numpy(), want.numpy())
    assert np.array_equal(np.asarray(own[:, 1]), want[:, 1].numpy())
    assert torch.equal(pickle.loads(pickle.dumps(own.T)), want.T)
    assert own.T.data_ptr() == own.data_ptr() != made().data_ptr()
    assert torch.equal(own.view(torch.int32).clone(), want.view(torch.int32))
    assert torch.equal(torch.stack(own.unbind(1)), want.T)
    assert type(own.double()) is torch.Tensor


def test_it_is_a_parameter_that_gradients_reach() -> None:
    own = nn.Parameter(made())
    assert isinstance(own, nn.Parameter)
    (own * 2).sum().backward()
    assert own.grad is not None
    assert torch.equal(own.grad, torch.full((3, 4), 2.0))
    copied = copy.deepcopy(own)
    assert type(copied) is nn.Parameter
    assert torch.equal(copied, VALUES * KEPT)


def test_what_others_look_at_is_not_written_over() -> None:
    latest = Latest(VALUES.nbytes)
    first, second = made(latest), made(latest, VALUES + 100)
    rows = first.whole()[2]
    assert torch.equal(first + second, (2 * VALUES + 100) * KEPT)
    assert torch.equal(torch.cat([second, first]), torch.cat([(VALUES + 100) * KEPT, VALUES * KEPT]))
    assert torch.equal(rows, VALUES[2])
    place = first.whole().data_ptr()  # nobody looks at it any more
    assert second.whole().data_ptr() == place


def test_layouts_are_those_of_parameters() -> None:
    values = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    kept = torch.ones(2, 1, 1, 1, dtype=torch.bool).expand(2, 3, 4, 5)
    own = masked_on_demand(values, lambda: kept, Latest(values.nbytes))
    assert own.stride() == own.clone().stride() == (values * kept).stride() == values.stride()
    assert torch.equal(own.flatten(1), values.flatten(1))


@pytest.mark.parametrize("bytes_at_once", [1, 60, 2**20])
def test_products_are_taken_some_rows_at_a_time(bytes_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working_memory, "BYTES_AT_ONCE", bytes_at_once)
    values = torch.randn(5, 3, 2, 2, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    values[1, 0, 0, 0], values[2, 1] = torch.nan, -torch.inf
    for mask in (
        torch.rand(5, 3, 2, 2) < 0.5,
        (torch.rand(5, 1, 1, 1) < 0.5).expand(5, 3, 2, 2),
        torch.rand(5, 3, 2, 2),
    ):
        mask = mask if mask.dtype == torch.bool else mask.bfloat16()
        own = masked_on_demand(values, lambda mask=mask: mask, Latest(values.nbytes))  # type: ignore[misc]
        assert torch.equal(own.clone().view(torch.int16), (mask * values).view(torch.int16))
    assert torch.equal(masked_on_demand(values[:0], lambda: values[:0], Latest(2)).clone(), values[:0])


def test_what_shares_memory_is_told_without_values() -> None:
    def unread(out: torch.Tensor) -> None:
        raise AssertionError(out.shape)

    form = torch.empty(3, 4, device="meta")
    own, other = (OnDemand(unread, form, torch.device("cpu"), Latest(48)) for _ in range(2))
    assert share_memory(own, own.t()[1:])
    assert not share_memory(own, other)
    assert not share_memory(own, VALUES)


@pytest.mark.parametrize("seed", range(6))
def test_finalize_gives_the_same_bits(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = network(seed, words=seed % 2 == 1)
    traced = fxprune.trace(model, (inputs(2),), modes=("eval",))
    for name, parameter in dict(traced.named_parameters()).items():
        if parameter.dim() > 1:
            fxprune.prune.custom_from_mask(traced, name, parameter != 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what cannot be told apart by values
        one, two = (_finalized(traced, monkeypatch, least) for least in (0, 2**40))
    assert one.plan is not None
    assert two.plan is not None
    assert one.plan.to_json() == two.plan.to_json()
    assert one.state_dict().keys() == two.state_dict().keys()
    for name, value in one.state_dict().items():
        assert type(value) is torch.Tensor
        assert torch.equal(value, two.state_dict()[name])
        assert value.stride() == two.state_dict()[name].stride()


def _finalized(traced: fxprune.TracedModule, monkeypatch: pytest.MonkeyPatch, least: int) -> fxprune.TracedModule:
    monkeypatch.setattr(on_demand, "LEAST", least)
    return fxprune.finalize(traced, align=1)


def test_what_stays_whole_is_a_plain_copy() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    traced = fxprune.trace(model, torch.randn(2, 4))
    fxprune.prune.l1_unstructured(traced, "0.weight", 0.3)
    seen: list[type] = []
    final = fxprune.finalize(traced)
    fxprune.finalize(traced, after=lambda step, module, *_: seen.extend(map(type, module.parameters())))
    assert {*map(type, final.parameters()), *seen} == {nn.Parameter}
    with torch.no_grad():
        traced.get_parameter("0.weight_orig").zero_()
    assert final.get_parameter("0.weight").any()


def test_finalize_that_finds_a_wrong_rule_still_names_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxprune.channels import folding

    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3)).eval()
    traced = fxprune.trace(model, torch.randn(2, 4))
    fxprune.prune.ln_structured(traced, "0.weight", 2, n=2, dim=0)
    monkeypatch.setattr(folding.Folding, "run", lambda self: None)
    with pytest.warns(AnalysisWarning, match="linear_1"):
        final = fxprune.finalize(traced)
    x = torch.randn(3, 4)
    assert torch.allclose(final(x), traced(x), atol=1e-6)
