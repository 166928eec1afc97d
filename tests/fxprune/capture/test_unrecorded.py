"""Steps of forward that no graph records are refused where they stand; what is advised in their place is captured."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.capture.unrecorded import refuse_exchanges
from fxprune.errors import CaptureError


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("a", torch.zeros(3))
        self.register_buffer("b", torch.ones(3))


class Inner(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.a.data = self.a + 1
        return self.layer(x) + self.a


class ExchangesBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).relu()


class ExchangesParameter(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.layer.weight.data = self.layer.weight.clamp(-0.1, 0.1)
        return self.layer(x)


class WritesToData(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight.data.clamp_(-0.1, 0.1)
        return self.layer(x)


class Gradient(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        return torch.autograd.grad(self.layer(x).tanh().sum(), x, create_graph=True)[0]


class Swap(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.a, self.b = self.b, self.a
        return self.layer(x) + self.a


class Another(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.a = self.b
        return self.layer(x) + self.a


class SwapOfValues(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.a, self.b = self.b.clone(), self.a.clone()
        return self.layer(x) + self.a


class WritesToTensor(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.layer.weight.clamp_(-0.1, 0.1)
            self.a.copy_(self.a + 1)
        return self.layer(x) + self.a


@pytest.mark.parametrize(
    ("kind", "line", "cure"),
    [
        (
            ExchangesBuffer,
            "inner (Inner), .*: `self.a.data = self.a + 1`: no graph records `tensor.data = ...`",
            "copy_",
        ),
        (ExchangesParameter, "`self.layer.weight.data = .*`: no graph records `tensor.data = ...`", "copy_"),
        (WritesToData, "`self.layer.weight.data.clamp_(-0.1, 0.1)`: no graph records `tensor.data`", "no_grad"),
        (Gradient, "`return torch.autograd.grad(.*)[0]`: no graph records `torch.autograd.grad`", "loop around"),
        (Swap, "`self.a, self.b = self.b, self.a`: no graph records `self.buffer = another`", "clone"),
        (Another, "`self.a = self.b`: no graph records `self.buffer = another`", "clone"),
    ],
)
def test_they_are_refused_where_they_stand(kind: type[nn.Module], line: str, cure: str) -> None:
    model = kind().eval()
    before = copy.deepcopy(model.state_dict())
    pattern = ".*".join(map(re.escape, line.split(".*"))) + f".*Work around: .*{cure}"
    with pytest.raises(CaptureError, match=pattern):
        fxprune.trace(model, torch.randn(4, 3), modes=("eval",))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [SwapOfValues, WritesToTensor])
def test_what_is_advised_is_captured(kind: type[nn.Module]) -> None:
    model = kind().eval()
    traced = fxprune.trace(copy.deepcopy(model), torch.randn(4, 3), modes=("eval",))
    for _ in range(3):
        x = torch.randn(5, 3)
        assert torch.equal(traced(x), model(x))


def test_values_exchanged_where_no_second_capture_shows_the_line_are_refused_too() -> None:
    model = ExchangesParameter()
    program = torch.export.export(model, (torch.ones(2, 3),))
    with pytest.raises(CaptureError, match=r"tensor\.data = \.\.\.` in forward"):
        refuse_exchanges(program, model, "eval", lambda: None)
