"""Copies of parameters are seen through where they are only read."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxprune
from fxprune.driver import plain_view
from fxprune.graph.copies import copied_parameters


class Tagger(nn.Module):
    """A recurrent layer and a linear layer, both of which read inputs in another order of memory."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 24, 3, padding=1)
        self.recurrent = getattr(nn, kind)(24, 20, batch_first=True, bidirectional=True)
        self.head = nn.Linear(40, 16)
        self.last = nn.Linear(16, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        states = self.recurrent(torch.relu(self.first(tokens)).transpose(1, 2))[0]
        found: torch.Tensor = self.last(torch.relu(self.head(states)))
        return found


class Copied(nn.Module):
    """A weight that is copied in forward, and written to there if asked for."""

    def __init__(self, is_written: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.is_written = is_written

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        weight = self.weight.clone()
        return nn.functional.linear(inputs, weight.mul_(2) if self.is_written else weight)


@pytest.fixture(params=["LSTM", "GRU", "RNN"])
def tagger(request: pytest.FixtureRequest) -> fxprune.TracedModule:
    torch.manual_seed(0)
    return fxprune.trace(Tagger(request.param).eval(), torch.randn(2, 4, 7), modes=("eval",))


def _groups(traced: fxprune.TracedModule) -> list[tuple[object, ...]]:
    groups = fxprune.channel_groups(traced)
    return [(g.name, g.kind, g.size, sorted(map(str, g.members)), g.traffic, g.macs, g.reason) for g in groups]


def test_groups_are_the_same_under_masks_and_once_finalized(tagger: fxprune.TracedModule) -> None:
    expected = _groups(tagger)
    masked = copy.deepcopy(tagger)
    for name in dict(tagger.named_parameters()):
        fxprune.prune.identity(masked, name)
    assert _groups(masked) == expected
    final = fxprune.finalize(masked)
    assert any(map(copied_parameters, final.graphs.values()))
    assert _groups(final) == expected


def test_what_is_finalized_still_reads_copies(tagger: fxprune.TracedModule) -> None:
    for name in dict(tagger.named_parameters()):
        fxprune.prune.identity(tagger, name)
    final = fxprune.finalize(tagger)
    before = final.code
    plain = plain_view(final)
    assert not any(map(copied_parameters, plain.graphs.values()))
    assert final.code == before
    assert any(map(copied_parameters, final.graphs.values()))
    tokens = torch.randn(3, 4, 7)
    torch.testing.assert_close(plain(tokens), final(tokens))
    assert all(value is final.get_parameter(name) for name, value in plain.named_parameters())


@pytest.mark.parametrize("is_written", [False, True])
def test_a_copy_that_is_written_to_stays(is_written: bool) -> None:
    inputs = torch.randn(2, 4)
    traced = fxprune.trace(Copied(is_written).eval(), inputs, modes=("eval",))
    plain = plain_view(traced)
    assert torch.equal(plain(inputs), traced(inputs))
    assert torch.equal(plain(inputs), traced(inputs))
    copies = [n for g in plain.graphs.values() for n in g.nodes if n.target is torch.ops.aten.clone.default]
    assert bool(copies) is is_written
