"""Random networks whose weights get norms, and masks above them: exact, and as much goes as from plain weights."""

from __future__ import annotations

import copy
import random

import pytest
import torch

import fxprune
from tests.fxprune.channels.exactness import EXACT, error
from tests.random_networks import network

QUICK = [(0, False), (1, False), (5, False), (0, True), (2, True)]


def check_norms(seed: int, words: bool) -> None:
    model, inputs = network(seed, words)
    r = random.Random(seed)
    x = inputs(2)
    weights = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.dim() > 1}
    masks = {name: p.detach() != 0 for name, p in weights.items()}
    with torch.no_grad():
        for name, p in weights.items():
            p.copy_(torch.where(masks[name], p, torch.randn_like(p)))
    traced = fxprune.trace(model, x, modes=("eval",), dynamic_shapes=None)
    for name in weights:
        kind = r.choice(["", "weight", "spectral"])
        if kind == "weight" or (
            kind and ("_ih_l" in name or "_hh_l" in name)
        ):  # a recurrent layer takes one spectral norm alone
            fxprune.weight_norm(traced, name, dim=r.choice([0, 1, None]))
        elif kind:
            fxprune.spectral_norm(traced, name)
    for name, mask in masks.items():
        if not bool(mask.all()):
            fxprune.prune.custom_from_mask(traced, name, mask)
    final = fxprune.finalize(traced, align=1)
    # which constants are the same depends on values: those of the plain weights are what norms and masks give
    twin = copy.deepcopy(model)
    twin.load_state_dict(fxprune.finalize(traced, shrink=False).state_dict(), strict=False)
    plain = fxprune.finalize(fxprune.trace(twin, x, modes=("eval",), dynamic_shapes=None), align=1)
    assert (final.plan is None) == (plain.plan is None)
    with torch.no_grad():
        first, second = inputs(2), inputs(2)
        for x in (first, second):
            assert error(traced(x), final(x)) < EXACT, f"seed {seed}"
        is_constant = error(traced(first), traced(second)) < EXACT
    # where everything is dead, which channels are the last ones of their axes decides what else stays
    if final.plan is not None and plain.plan is not None and not is_constant:
        assert final.plan.parameters == plain.plan.parameters
        assert final.plan.macs == plain.plan.macs


@pytest.mark.parametrize(("seed", "words"), QUICK)
def test_masks_over_norms_of_a_random_network_shrink_it_as_masks_on_plain_weights(seed: int, words: bool) -> None:
    check_norms(seed, words)


@pytest.mark.slow
@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("first", range(100, 200, 20))
def test_masks_over_norms_of_many_random_networks_shrink_them(first: int, words: bool) -> None:
    for seed in range(first, first + 20):
        check_norms(seed, words)
