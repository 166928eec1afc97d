"""What models of libraries do to channels, rebuilt small: each shrinks exactly, in float64, at other batch sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxprune
from tests.fxprune.channels.exactness import error


class PositionBias(nn.Module):
    """Attention within a window, with a bias from a table by stored positions, as Swin and BEiT have it."""

    def __init__(self, heads: int = 4, side: int = 3) -> None:
        super().__init__()
        self.heads, self.tokens = heads, side * side
        self.norm, self.qkv, self.proj = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * side - 1) ** 2, heads))
        at = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        apart = at[:, None] - at[None] + side - 1
        self.register_buffer("relative_position_index", apart[..., 0] * (2 * side - 1) + apart[..., 1])

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = self.qkv(y).reshape(-1, self.tokens, 3, self.heads, 4).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        bias = bias.view(self.tokens, self.tokens, -1).permute(2, 0, 1).contiguous()
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.unsqueeze(0))
        return x + self.proj(y.transpose(1, 2).reshape(-1, self.tokens, 16))


class FullPrecisionRegion(nn.Module):
    """A region that autocast is kept out of, as EfficientViT's linear attention has it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.first(x).relu()).relu()
        with torch.autocast("cpu", enabled=False):
            hidden = hidden * hidden.sigmoid()
        return self.third(hidden)


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "a table of biases by stored positions": (PositionBias, (9, 16)),
    "a region without autocast": (FullPrecisionRegion, (6,)),
}


@pytest.mark.parametrize(("build", "shape"), KINDS.values(), ids=KINDS)
def test_a_budget_is_reached_exactly(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = build().double().eval()
    traced = fxprune.trace(model, torch.randn(2, *shape, dtype=torch.float64), modes=("eval",))
    report = fxprune.prune.channels(traced, macs=0.7, round_to=1)
    assert report.macs[1] <= 0.7 * report.macs[0]
    final = fxprune.finalize(traced)
    assert final.plan is not None
    assert not final.plan.refused
    for batch in (1, 2, 5):
        x = torch.randn(batch, *shape, dtype=torch.float64)
        with torch.no_grad():
            assert error(traced(x), final(x)) < 1e-9


class Precise(nn.Module):
    """A product that is computed without autocast, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.hidden, self.down = nn.Linear(6, 32), nn.Linear(32, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        with torch.autocast(device_type="cpu", enabled=False):
            x = x @ (x.transpose(1, 2) @ x)
        y: Tensor = self.down(self.hidden(x).relu())
        return y


def test_products_without_autocast_count() -> None:
    torch.manual_seed(0)
    traced = fxprune.trace(Precise().eval(), torch.randn(2, 5, 6), modes=("eval",))
    report = fxprune.prune.channels(traced, macs=0.9)
    final = fxprune.finalize(traced)
    assert final.plan is not None
    assert report.macs == final.plan.macs
    assert report.macs[0] == 5 * (6 * 32 + 32 * 32 + 32 * 3) + 2 * 5 * 32 * 32


class Turned(nn.Module):
    """Heads of four channels and two pairs, which are turned as complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.register_buffer("turns", torch.polar(torch.ones(5, 1, 2), torch.rand(5, 1, 2)))

    def forward(self, x: Tensor) -> Tensor:
        plain, pairs = self.first(x).view(*x.shape[:2], 2, 8).split([4, 4], -1)
        numbers = torch.view_as_complex(pairs.float().reshape(*pairs.shape[:-1], -1, 2))
        turned = torch.view_as_real(numbers * self.turns).flatten(3)
        return self.last(torch.cat([plain.relu(), turned], -1).flatten(2))


def test_complex_numbers_are_read_from_what_removal_leaves_with_odd_strides() -> None:
    model, x = Turned().eval(), torch.randn(2, 5, 6)
    traced = fxprune.trace(model, x, modes=("eval",))
    mask = torch.ones(16, 6)
    mask[[1, 9]] = 0
    fxprune.prune.custom_from_mask(traced, "first.weight", mask)
    fxprune.prune.custom_from_mask(traced, "first.bias", mask[:, 0])
    final = fxprune.finalize(traced, align=1)
    assert final.get_parameter("first.weight").shape[0] == 14
    torch.testing.assert_close(final(x), traced(x))
