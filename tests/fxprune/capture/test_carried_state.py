"""Forwards that carry state in plain attributes are refused where that changes what they give, and else captured."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import CaptureError


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.calls = 0
        self.last: Tensor | None = None


class Counts(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * self.calls


class Remembers(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        result = y if self.last is None else y + self.last
        self.last = y.detach().mean(0)
        return result


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).relu()


class CountsAlone(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x)


class MakesOnce(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls or 2
        return self.layer(x) * self.calls


class Registered(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.steps += 1
        return self.norm(self.layer(x)) * self.steps


@pytest.mark.parametrize(("kind", "name"), [(Counts, "calls"), (Remembers, "last")])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_state_that_changes_the_result_is_refused_by_name(kind: type[nn.Module], name: str, mode: str) -> None:
    model = Around(kind())
    with pytest.raises(CaptureError, match=rf"forward changes 'inner\.{name}', .*register_buffer"):
        fxprune.trace(model, torch.randn(4, 3), modes=(mode,))
    assert (model.inner.calls, model.inner.last) == (0, None)


@pytest.mark.parametrize("kind", [CountsAlone, MakesOnce, Registered])
def test_other_state_is_captured(kind: type[nn.Module]) -> None:
    model = kind()
    traced = fxprune.trace(copy.deepcopy(model), torch.randn(4, 3))
    for mode in (True, False):
        traced.train(mode)
        model.train(mode)
        for _ in range(3):
            x = torch.randn(5, 3)
            assert torch.equal(traced(x), model(x))
