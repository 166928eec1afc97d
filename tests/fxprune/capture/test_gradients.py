"""Code whose gradients are not those of its operators: captured where they are the same, else refused for training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import CaptureError, EvalOnlyWarning
from fxprune.graph.equality import error


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return gradient


class Saving(torch.autograd.Function):
    """SiLU that keeps its input alone, with the gradient that its operators have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        (x,) = ctx.saved_tensors
        return gradient * x.sigmoid() * (1 + x * (1 - x.sigmoid()))


class Calling(nn.Module):
    """Tied layers, a norm before which a bias has no gradient, and a function of what they give."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.second.weight, self.function = self.first.weight, function

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.function(self.norm(self.second(self.first(x))))
        return found * 2.0


def hooked(x: Tensor) -> Tensor:
    if x.requires_grad:
        x.register_hook(lambda gradient: gradient * 3.0)
    return x


def watched(x: Tensor) -> Tensor:
    if x.requires_grad:
        x.register_hook(lambda gradient: None)
    return x


@pytest.mark.parametrize(
    ("function", "name"),
    [(Rounded.apply, "Rounded"), (hooked, "Tensor.register_hook")],
)
def test_other_gradients_than_those_of_operators_are_refused_for_training(function: Any, name: str) -> None:
    model, x = Calling(function), torch.randn(8, 6)
    state = copy.deepcopy(model.state_dict())
    hook = Tensor.register_hook
    with pytest.warns(EvalOnlyWarning, match=name):
        traced = fxprune.trace(model, x)
    assert torch.equal(traced.eval()(x), model.eval()(x))
    with pytest.raises(CaptureError, match=name):
        fxprune.trace(model, x, modes=("train",))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert Tensor.register_hook is hook


@pytest.mark.parametrize("function", [Saving.apply, watched])
def test_functions_and_hooks_that_leave_gradients_alone_are_captured(function: Any) -> None:
    model, x = Calling(function), torch.randn(8, 6)
    eager, traced = copy.deepcopy(model), fxprune.trace(model, x)
    for module in (eager, traced):
        module.train()(x).square().sum().backward()
    largest = max(float(p.grad.abs().max()) for p in eager.parameters() if p.grad is not None)
    for expected, found in zip(eager.parameters(), traced.parameters(), strict=True):
        assert expected.grad is not None
        assert found.grad is not None
        assert float(expected.grad.abs().max()) < 1e-6 * largest or error(expected.grad, found.grad) < 1e-5
