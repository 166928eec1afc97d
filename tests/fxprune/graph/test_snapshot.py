"""A module that is run under `preserved` is as it was afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxprune
from fxprune.graph.snapshot import preserved


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def test_modes_buffers_and_generator_come_back_after_an_error() -> None:
    model = _network()
    model[1].eval()  # a frozen norm in a network that trains
    modes = [m.training for m in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    objects = dict(model.named_buffers())
    generator = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), preserved(model):
        model.train()
        model(torch.randn(8, 3))
        assert not torch.equal(model[1].running_mean, state["1.running_mean"])
        model[1].running_var = torch.zeros(4)
        raise ZeroDivisionError
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert all(dict(model.named_buffers())[name] is value for name, value in objects.items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_buffer_that_did_not_change_does_not_look_written() -> None:
    model = _network().eval()
    model[1].running_mean[0] = torch.nan
    model[1].running_mean[0] = 0.0
    version = model[1].running_var._version
    with preserved(model):
        model(torch.randn(8, 3))
    assert model[1].running_var._version == version


def test_traced_modules_get_their_graph_back_inside_others_too() -> None:
    traced = fxprune.trace(_network(), (torch.randn(4, 3),))
    outer = nn.Sequential(traced, nn.ReLU()).eval()
    graph = traced.graph
    with preserved(outer):
        outer.train()
        assert traced.graph is not graph
    assert traced.graph is graph
    assert not traced.training
    x = torch.randn(4, 3)
    assert torch.equal(outer(x), outer(x))  # no dropout


def test_parts_in_different_modes_stay_apart() -> None:
    eval_only = fxprune.trace(_network().eval(), (torch.randn(4, 3),), modes=("eval",))
    outer = nn.Sequential(eval_only, nn.Dropout())
    assert outer.training
    assert not eval_only.training
    with preserved(outer):
        outer.eval()
    assert outer.training
    assert outer[1].training
    assert not eval_only.training
