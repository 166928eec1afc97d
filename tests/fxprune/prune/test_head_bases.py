"""Changes of basis within attention heads: where they are found, that they are exact, and what they are good for."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fxprune
from fxprune.graph.names import tensor_at
from fxprune.prune.repair.bases import Basis, changed, find_bases, only_exact, sorted_bases
from fxprune.prune.repair.batches import Batches
from fxprune.prune.repair.finding import find
from fxprune.prune.repair.input_moments import InputMoments
from fxprune.prune.repair.turning import Turning
from tests.attention_spellings import HEADS, SIZE, SPELLINGS, attention

STAY = (
    "rotary", "queries normalized", "keys read elsewhere", "lengths of keys read elsewhere",
    "keys read elsewhere by what returns integers", "one layer for both",
)  # fmt: skip
TURN = [spelling for spelling in SPELLINGS if spelling not in STAY]


@functools.cache
def traced_once(spelling: str) -> fxprune.TracedModule:
    model, x = attention(spelling)
    return fxprune.trace(model, (x[:2],), modes=("eval",))


def tensors_of(traced: fxprune.TracedModule) -> Callable[[str], Tensor]:
    return lambda name: tensor_at(traced, name).detach()


def bases_of(spelling: str) -> list[Basis]:
    traced, (_, x) = traced_once(spelling), attention(spelling)
    graph, tensors = traced.graphs["eval"], tensors_of(traced_once(spelling))
    return only_exact(find_bases(graph, find(traced, graph)[0], tensors, [x[:2]]), graph, tensors, [x[:2]])


def moments_of(spelling: str, bases: list[Basis]) -> InputMoments:
    traced, (_, x) = traced_once(spelling), attention(spelling)
    graph = traced.graphs["eval"]
    moments = InputMoments([reader for basis in bases for reader in basis.readers], len(x))
    for piece in Batches(traced, graph, x, None):
        moments.add(graph, tensors_of(traced), piece)
    return moments


@pytest.mark.parametrize("spelling", TURN)
def test_heads_are_found_however_attention_is_spelled_and_their_best_basis_computes_the_same(spelling: str) -> None:
    model, x = attention(spelling)
    bases = bases_of(spelling)
    assert [basis.is_product for basis in bases] == [True, False]
    count = 2 if "shared" in spelling else HEADS
    assert all(len(basis.heads) == count for basis in bases)
    found = moments_of(spelling, bases).found
    turned = dict(model.state_dict())
    for basis in bases:
        changes = sorted_bases(basis, found, turned.__getitem__)
        turned |= changed(basis, changes, turned.__getitem__)
        assert all(bool((change.energy.diff() <= 1e-12).all()) for change in changes)
    assert not torch.allclose(turned[bases[0].first.name], model.state_dict()[bases[0].first.name], rtol=0.1)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.functional_call(model, turned, (x,)), model(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("spelling", STAY)
def test_queries_and_keys_stay_that_something_else_sees(spelling: str) -> None:
    assert [basis.is_product for basis in bases_of(spelling)] == [False]


def test_the_truncated_basis_has_less_error_of_logits_than_any_choice_of_channels() -> None:
    model, x = attention("separate")
    bases = bases_of("separate")
    found = moments_of("separate", bases).found
    state = model.state_dict()
    turned = changed(bases[0], sorted_bases(bases[0], found, state.__getitem__), state.__getitem__)

    def channels(parameters: dict[str, Tensor], name: str) -> Tensor:
        own = x.flatten(0, 1) @ parameters[f"{name}.weight"].T + parameters[f"{name}.bias"]
        return own.unflatten(-1, (HEADS, SIZE)).transpose(0, 1)

    def error(parameters: dict[str, Tensor], kept: list[list[int]]) -> Tensor:
        """Of logits of all pairs of positions, about the mean over keys, relative for each head."""
        query, key = channels(parameters, "q"), channels(parameters, "k")
        gone = torch.stack([torch.tensor([i not in some for i in range(SIZE)]) for some in kept])
        lost = (query * gone[:, None]) @ (key - key.mean(1, keepdim=True)).transpose(1, 2)
        return lost.square().mean((1, 2))

    for count in (1, 2, 3):
        best = error({**state, **turned}, [[*range(count)]] * HEADS)
        for choice in torch.combinations(torch.arange(SIZE), count).tolist():
            assert bool((best < error(state, [choice] * HEADS)).all())


@pytest.mark.parametrize("spelling", ["separate", "explicit", "einsum", "chunk", "unbind", "shared by enable_gqa"])
def test_what_is_left_of_heads_loses_less_where_their_bases_can_turn(
    spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, x = attention(spelling)
    dense = traced_once(spelling)
    errors = []
    for turns in (True, False):
        traced = copy.deepcopy(dense)
        fxprune.prune.channels(traced, 0.5, kinds=["head channel"], round_to=1)
        if not turns:
            monkeypatch.setattr(Turning, "bases", lambda self, piece: [])
        fxprune.reconstruct(traced, x)
        errors.append((traced(x) - dense(x)).square().mean().item())
        torch.testing.assert_close(fxprune.finalize(traced)(x), traced(x))
    assert errors[0] < errors[1]
