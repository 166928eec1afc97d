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


@pytest.mark.parametrize("spelling", ["separate", "chunk", "shared by expand"])
def test_repairs_again_towards_another_module_as_heads_turned_before_is_as_good_as_at_once(spelling: str) -> None:
    model, x = attention(spelling)
    dense = model(x).detach()

    def error(traced: fxprune.TracedModule) -> float:
        return (traced(x) - dense).square().mean().item()

    traced = copy.deepcopy(traced_once(spelling))
    fxprune.prune.channels(traced, 0.25, kinds=["head channel"], round_to=1)
    fxprune.reconstruct(traced, x, reference=model)
    once = error(traced)
    fxprune.reconstruct(traced, x, reference=model)
    assert error(traced) == pytest.approx(once)
    fxprune.prune.channels(traced, 0.5, kinds=["head channel"], round_to=1)
    masks = {name.removesuffix("_mask"): mask.clone() for name, mask in traced.named_buffers()}
    fxprune.reconstruct(traced, x, reference=model)
    at_once = copy.deepcopy(traced_once(spelling))
    for name, mask in masks.items():
        fxprune.prune.custom_from_mask(at_once, name, mask)
    fxprune.reconstruct(at_once, x, reference=model)
    assert error(traced) == pytest.approx(error(at_once), rel=0.05)


def test_heads_that_were_trained_since_they_turned_are_not_mixed_up() -> None:
    model, x = attention("separate")
    dense = model(x).detach()
    traced = copy.deepcopy(traced_once("separate"))
    fxprune.prune.channels(traced, 0.5, kinds=["head channel"], round_to=1)
    fxprune.reconstruct(traced, x, reference=model)
    optimizer = torch.optim.SGD(traced.parameters(), 1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        (traced(x) - dense).square().mean().backward()
        optimizer.step()
    before = (traced(x) - dense).square().mean().item()
    fxprune.prune.channels(traced, 0.5, kinds=["MLP unit", "attention head"], importance="random", seed=0, round_to=1)
    broken = (traced(x) - dense).square().mean().item()
    fxprune.reconstruct(traced, x, reference=model)
    assert before < (traced(x) - dense).square().mean().item() < broken


def test_heads_turn_between_the_steps_of_a_schedule() -> None:
    model, x = attention("chunk")
    traced = copy.deepcopy(traced_once("chunk"))

    def step(gone: float) -> fxprune.ChannelReport:
        return fxprune.prune.channels(traced, gone, kinds=["head channel"], round_to=1)

    schedule = fxprune.Schedule(traced, None, step, 0.5, stop=2, initial=0.2)
    errors = []
    for _ in range(3):
        schedule.step()
        fxprune.reconstruct(traced, x, reference=model)
        errors.append((traced(x) - model(x)).square().mean().item())
    assert errors[0] < errors[1]
    plain = copy.deepcopy(traced_once("chunk"))
    fxprune.prune.channels(plain, 0.5, kinds=["head channel"], round_to=1)
    assert errors[-1] < (plain(x) - model(x)).square().mean().item()
    torch.testing.assert_close(fxprune.finalize(traced)(x), traced(x))
