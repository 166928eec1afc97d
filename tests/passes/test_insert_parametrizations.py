"""Several norms inserted at once: what one after another gives, for as many captures as there are forms."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.capture.front_end import trace
from fxprune.errors import PruningError
from fxprune.graph.text import text
from fxprune.passes import InsertSpectralNorm, InsertWeightNorm, insert_parametrization, run_passes
from fxprune.passes.insert_parametrization import InsertParametrizations
from tests import sharded_networks

STEPS = (
    InsertWeightNorm("0.weight"),
    InsertWeightNorm("1.weight"),
    InsertWeightNorm("2.weight", dim=1),
    InsertSpectralNorm("3.weight"),
    InsertSpectralNorm("4.weight"),
    InsertSpectralNorm("5.weight"),
    InsertSpectralNorm("6.weight", n_power_iterations=2),
    InsertSpectralNorm("7.weight"),
    InsertSpectralNorm("8.weight"),
    InsertWeightNorm("9.weight"),
)
# alone in its form: 2 by its dimension, 5 by the layout of its memory, 6 by its options, 7 as it is frozen, 8 as it is
# transposed, 9 by its shape
FORMS = 8


@pytest.fixture
def traced() -> fxprune.TracedModule:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 3, 3, padding=1) for _ in range(8)]
    layers += [nn.ConvTranspose2d(3, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)]
    layers[5].to(memory_format=torch.channels_last)
    layers[7].requires_grad_(False)
    return fxprune.trace(nn.Sequential(*layers), (torch.randn(2, 3, 4, 4),))


def test_several_at_once_give_what_one_after_another_gives(traced: fxprune.TracedModule) -> None:
    at_once, one_by_one = copy.deepcopy(traced), copy.deepcopy(traced)
    for module, pipeline in ((at_once, [InsertParametrizations(STEPS)]), (one_by_one, STEPS)):
        torch.manual_seed(1)
        assert run_passes(module, pipeline).modified
    for mode, graph in at_once.graphs.items():
        assert text(graph) == text(one_by_one.graphs[mode])
    x = torch.randn(2, 3, 4, 4)
    for _ in range(2):  # power iterations move the buffers
        assert torch.equal(at_once(x), one_by_one(x))
    expected = one_by_one.state_dict()
    assert list(at_once.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in at_once.state_dict().items())
    trained = [[p for p in module.parameters() if p.requires_grad] for module in (at_once, one_by_one)]
    gradients = [
        torch.autograd.grad(module(x).square().sum(), parameters)
        for module, parameters in zip((at_once, one_by_one), trained, strict=True)
    ]
    assert all(torch.equal(got, want) for got, want in zip(*gradients, strict=True))
    assert torch.equal(at_once.eval()(x), one_by_one.eval()(x))


def test_norms_of_one_form_share_a_capture_and_no_tensor(
    traced: fxprune.TracedModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    captures = []

    def counting(*args: Any, **kwargs: Any) -> fxprune.TracedModule:
        captures.append(args)
        return trace(*args, **kwargs)

    monkeypatch.setattr(insert_parametrization, "trace", counting)
    InsertParametrizations(STEPS)(traced)
    assert len(captures) == FORMS
    places = [tensor.data_ptr() for tensor in traced.state_dict().values()]
    assert len(set(places)) == len(places)


def test_one_norm_that_cannot_be_inserted_inserts_none(traced: fxprune.TracedModule) -> None:
    before = {mode: text(graph) for mode, graph in traced.graphs.items()}
    with pytest.raises(PruningError, match="'0.scale': it is no parameter"):
        InsertParametrizations((*STEPS, InsertWeightNorm("0.scale")))(traced)
    assert {mode: text(graph) for mode, graph in traced.graphs.items()} == before
    assert not InsertParametrizations(())(traced).modified


@pytest.mark.parametrize("dim", [None, -1])
def test_a_norm_of_one_number_is_refused_where_fsdp_cannot_shard_it_and_changes_nothing(
    alone: None, dim: int | None
) -> None:
    module = sharded_networks.by_fsdp(sharded_networks.traced())
    before = list(module.state_dict())
    with pytest.raises(fxprune.errors.ShardingError, match="makes one number of it"):
        fxprune.weight_norm(module, "inner.weight", dim=dim)
    assert list(module.state_dict()) == before
    fxprune.weight_norm(module, "inner.weight", dim=0)
    module(sharded_networks.inputs()).sum().backward()
