"""Channels that are dead, or that nothing reads, go behind every kind of selection, product and convolution."""

from __future__ import annotations

import pytest
import torch

import fxprune
from tests.fxprune.channels.exactness import EXACT, error
from tests.fxprune.channels.unread_networks import (
    CONVOLUTIONS,
    EQUATIONS,
    PRODUCTS,
    SELECTIONS,
    SHAPES,
    SHARED,
    SHUFFLES,
    Case,
)

CASES = {
    f"{kind}: {name}": case
    for kind, cases in {
        "selection": SELECTIONS, "shuffle": SHUFFLES, "equation": EQUATIONS, "product": PRODUCTS, "shared": SHARED,
        "convolution": CONVOLUTIONS,
    }.items()
    for name, case in cases.items()
}  # fmt: skip


def checked(case: Case) -> fxprune.ChannelPlan:
    """The plan of a case's network, finalized; exact at several batch sizes."""
    torch.manual_seed(0)
    model = case.build().double().eval()
    shape = SHAPES[case.over]
    final = fxprune.finalize(fxprune.trace(model, (torch.randn(2, *shape).double(),), modes=("eval",)), align=1)
    assert final.plan is not None
    for batch in (1, 3):
        x = torch.randn(batch, *shape).double()
        with torch.no_grad():
            assert error(model(x), final(x)) < EXACT
    return final.plan


@pytest.mark.parametrize("name", CASES)
def test_what_is_dead_or_unread_goes(name: str) -> None:
    plan = checked(CASES[name])
    left = {key: len(plan.kept[key[0]][key[1]]) for key in CASES[name].left if key[0] not in plan.dropped}
    assert left == CASES[name].left, plan.explain()
