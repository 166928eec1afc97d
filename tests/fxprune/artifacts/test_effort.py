"""While numbers are tried, calls far larger than any of the model are not carried out."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxprune
from fxprune.artifacts.effort import Effort
from fxprune.errors import WriteBackError


class Attention(nn.Module):
    """Attention whose positions follow from the size of its heads, as in Hiera: a smaller one makes more of them."""

    done: ClassVar[list[int]] = []

    def __init__(self, width: int = 64, heads: int = 2) -> None:
        super().__init__()
        self.width, self.heads, self.head_dim = width, heads, width // heads
        self.qkv, self.proj = nn.Linear(24, 3 * width), nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).reshape(len(x), -1, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v)
        self.done.append(q.numel() * k.shape[-2])
        return self.proj(y.transpose(1, 2).reshape(len(x), -1, self.width))


def test_sizes_of_heads_that_would_make_positions_of_channels_are_passed_over() -> None:
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(2, 10, 24)
    traced = fxprune.trace(model, x, dynamic_shapes=None, modes=("eval",))
    usual = model.done[0]
    fxprune.prune.channels(traced, 0.4, kinds="head channel", round_to=1)
    model.done.clear()
    small = fxprune.write_back(fxprune.finalize(traced), model)
    assert max(model.done) <= 4 * usual
    torch.testing.assert_close(small(x), traced(x), rtol=1e-5, atol=1e-6)
    assert small.head_dim == 32  # the class scales by its root: what went of a head is there as zeros


def test_products_are_counted_and_large_ones_refused() -> None:
    a, b = torch.randn(3, 4, 5), torch.randn(3, 5, 6)
    with Effort() as effort:
        for product in (a @ b, torch.matmul(a, b), a.matmul(b), torch.bmm(a, b)):
            assert product.shape == (3, 4, 6)
    assert effort.largest == 3 * 4 * 5 * 6
    wide = torch.randn(3, 5, 30)
    with Effort(effort.largest), pytest.raises(WriteBackError, match="1.8e[+]03 multiplications in one call"):
        a @ wide
    with Effort(effort.largest):
        assert (a[0, 0] @ b[0, :, 0]).dim() == 0
