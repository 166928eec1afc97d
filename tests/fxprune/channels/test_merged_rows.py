"""Heads that are merged with batch and positions, and meet others that are cut into groups, are followed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxprune


class GatedRows(nn.Module):
    """Four heads of six, in two groups on one side, normalized and gated as rows of one axis."""

    def __init__(self, normed: bool = True) -> None:
        super().__init__()
        self.normed = normed
        self.value, self.gate, self.out = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        value, gate = self.value(x).view(batch, length, 2, 2, 6), self.gate(x).view(batch, length, 4, 6)
        rows = value.reshape(-1, 6)
        if self.normed:
            rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + 0.1)
        rows = rows * nn.functional.silu(gate.reshape(-1, 6))
        y: Tensor = self.out(rows.reshape(gate.shape).reshape(batch, length, -1))
        return y


@pytest.mark.parametrize("bias", [False, True], ids=["zeros", "constants"])
def test_heads_go_from_rows_that_are_merged_with_batch_and_positions(bias: bool) -> None:
    torch.manual_seed(0)
    model = GatedRows(normed=not bias).double().eval()
    with torch.no_grad():
        for layer in (model.value, model.gate):
            for head in (1, 3):
                layer.weight[6 * head : 6 * head + 6] = 0
                if not bias:
                    layer.bias[6 * head : 6 * head + 6] = 0
    x = torch.randn(2, 5, 8, dtype=torch.double)
    traced = fxprune.trace(model, x, modes=("eval",))
    final = fxprune.finalize(traced, align=1)
    assert final.get_parameter("value.weight").shape == (12, 8)
    assert final.get_parameter("gate.weight").shape == (12, 8)
    for batch in (1, 3):
        x = torch.randn(batch, 5, 8, dtype=torch.double)
        torch.testing.assert_close(final(x), model(x), rtol=1e-12, atol=1e-12)


def test_heads_are_chosen_that_are_merged_with_batch_and_positions() -> None:
    torch.manual_seed(0)
    model = GatedRows().eval()
    traced = fxprune.trace(model, torch.randn(2, 5, 8), modes=("eval",))
    sizes = [group.size for group in fxprune.channel_groups(traced) if group.reason is None]
    assert sizes.count(2) == 2  # groups, and heads within each
