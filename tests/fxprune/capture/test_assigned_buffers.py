"""Buffers that the forward assigns: eager gives the name another tensor, a graph writes into the one that is there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxprune


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("count", torch.ones(()))
        self.register_buffer("last", torch.zeros(3))


class ReadBefore(_Net):
    """The backward pass needs the value before."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) * self.count
        self.count = self.count + 1
        return y


class AddedTo(_Net):
    """Python assigns what `+=` has written into."""

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.count *= 2
        return self.layer(x) * self.count


class Average(_Net):
    def forward(self, x: Tensor) -> Tensor:
        self.last = 0.9 * self.last + 0.1 * self.layer(x).detach().mean(0)
        return self.layer(x) * self.last


class ReturnsThePrevious(_Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before, view = self.last, self.last.view(1, 3)
        self.last = self.layer(x).detach().mean(0)
        return self.layer(x) - self.last, before, view


class WrittenThenAssigned(_Net):
    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        y = self.layer(x) * self.count
        self.count = self.count * 2
        return y


@pytest.mark.parametrize("build", [ReadBefore, AddedTo, Average, ReturnsThePrevious, WrittenThenAssigned])
def test_an_assigned_buffer_trains_as_in_eager(build: type[nn.Module]) -> None:
    torch.manual_seed(0)
    traced = fxprune.trace(build(), torch.randn(2, 3))
    eager = build()
    eager.load_state_dict(traced.state_dict())
    for training in (True, False, True):
        x = torch.randn(4, 3)
        results = []
        for module in (eager.train(training), traced.train(training)):
            outputs = module(x)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            module.zero_grad()
            outputs[0].square().sum().backward()
            results.append([*outputs, *(p.grad for p in module.parameters()), *module.buffers()])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_graph_copies_a_buffer_only_where_something_reads_it_beside_the_assignment() -> None:
    class Counts(_Net):
        def forward(self, x: Tensor) -> Tensor:
            self.count = self.count + 1
            return self.layer(x)  # type: ignore[no-any-return]

    for build, copies in ((Counts, 0), (AddedTo, 0), (ReadBefore, 1)):
        graph = fxprune.trace(build(), torch.randn(2, 3), modes=("eval",)).graph
        assert len(graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)) == copies
