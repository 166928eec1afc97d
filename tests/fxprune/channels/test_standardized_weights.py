"""Weights that are standardized in forward, as those of networks without normalization are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import PruningError


class Standardized(nn.Conv2d):
    """Each row of its weight has mean zero and variance one."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.flatten(1)[None]
        weight = nn.functional.batch_norm(rows, None, None, training=True, momentum=0.0)
        return nn.functional.conv2d(x, weight.reshape_as(self.weight), self.bias, padding=1)


def test_what_is_standardized_over_stays_and_the_refusal_says_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Standardized(3, 16, 3), nn.ReLU(), Standardized(16, 16, 3), nn.ReLU(), Standardized(16, 4, 3))
    traced = fxprune.trace(model.eval(), torch.randn(2, 3, 6, 6), modes=("eval",))
    with pytest.raises(PruningError, match="statistics over it"):
        fxprune.prune.channels(traced, macs=0.7, round_to=1)


@pytest.mark.parametrize("modes", [("eval",), ("train", "eval")])
def test_budgets_count_what_finalize_leaves_beside_standardized_weights(modes: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Standardized(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1))
    model, x = model.eval(), torch.randn(2, 3, 6, 6)
    traced = fxprune.trace(model, x, modes=modes)
    report = fxprune.prune.channels(traced, 0.5, scope="local", round_to=1)
    final = fxprune.finalize(traced.eval())
    assert final.plan is not None
    assert report.macs == final.plan.macs
    assert report.macs[1] < report.macs[0]
    x = torch.randn(3, 3, 6, 6).double()
    torch.testing.assert_close(final.double()(x), traced.double()(x), rtol=1e-9, atol=1e-9)
    small = fxprune.write_back(fxprune.finalize(traced), model.double())
    torch.testing.assert_close(small(x), traced(x), rtol=1e-9, atol=1e-9)
