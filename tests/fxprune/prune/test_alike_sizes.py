"""Axes that a class sizes with the same number keep equally many channels, where channels are chosen for the class."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.channels.groups import Grouping
from fxprune.graph.said_sizes import said_sizes
from fxprune.prune.alike_sizes import alike_sizes


class Attention(nn.Module):
    """As in YOLO11: heads of keys and values in one convolution, and the width of the result taken from the input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.key_dim = self.head_dim // 2
        self.scale = self.key_dim**-0.5
        self.qkv = nn.Conv2d(width, width + 2 * self.key_dim * heads, 1)
        self.positions = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, rows, columns = x.shape
        q, k, v = (
            self.qkv(x)
            .view(batch, self.heads, 2 * self.key_dim + self.head_dim, rows * columns)
            .split([self.key_dim, self.key_dim, self.head_dim], 2)
        )
        scores = ((q * self.scale).transpose(-2, -1) @ k).softmax(-1)
        y = (v @ scores.transpose(-2, -1)).view(batch, width, rows, columns)
        return self.out(y + self.positions(v.reshape(batch, width, rows, columns)))


class Split(nn.Module):
    """A split by one attribute, which is the width of both parts; and attention on one of them."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.first, self.last = nn.Conv2d(3, 2 * width, 3, padding=1), nn.Conv2d(2 * width, 5, 1)
        self.attention = Attention(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).relu().split((self.width, self.width), 1)
        return self.last(torch.cat([a, b + self.attention(b)], 1))


def test_which_axes_a_class_sizes_alike_is_read_from_a_run() -> None:
    model = Split().eval()
    said = said_sizes(model, ((torch.randn(2, 3, 6, 6),), {}))
    assert type(model.width) is int
    origins = [size.origin for size in said.axes]
    assert origins.count(("attribute", "", "width", None)) == 2
    assert [origin[2] for origin in origins if origin[0] == "size"].count(1) == 2  # the width of the attention's input
    assert (
        "+",
        ("*", ("attribute", "attention", "key_dim", None), 2),
        ("attribute", "attention", "head_dim", None),
    ) in (origins)


@pytest.mark.parametrize("share", [0.8, 0.6, 0.4])
def test_what_is_sized_alike_comes_back_without_zeros(share: float) -> None:
    torch.manual_seed(0)
    model = Split().eval()
    nn.init.constant_(model.first.weight[:16], 0.01)  # the first part would go alone
    traced = fxprune.trace(model, torch.randn(2, 3, 6, 6), modes=("eval",))
    fxprune.prune.channels(traced, macs=share, round_to=1, runnable=model)
    final = fxprune.finalize(traced)
    small = fxprune.write_back(final, model)
    sizes = [sum(p.numel() for p in module.parameters()) for module in (model, final, small)]
    assert sizes[0] > sizes[1] == sizes[2]
    x = torch.randn(3, 3, 6, 6).double()
    torch.testing.assert_close(small.double()(x), traced.double()(x), rtol=1e-9, atol=1e-9)


def test_a_second_budget_finds_the_same_axes_under_masks() -> None:
    model = Split().eval()
    traced = fxprune.trace(model, torch.randn(2, 3, 6, 6), modes=("eval",))
    for share in (0.8, 0.5):
        fxprune.prune.channels(traced, macs=share, round_to=1, runnable=model)
    small = fxprune.write_back(fxprune.finalize(traced), model)
    assert small.first.out_channels == 2 * small.width < 32


class Strict(nn.Module):
    """Code that takes no other integers than Python's own."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 4
        self.layer, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        if type(self.width) is not int:
            raise TypeError
        return self.last(torch.cat(self.layer(x).split((self.width, self.width), 1), 1).relu())


def test_code_that_takes_no_other_integers_is_left_as_it_is() -> None:
    model = Strict().eval()
    traced = fxprune.trace(model, torch.randn(2, 3), modes=("eval",))
    assert not alike_sizes(Grouping(traced), model).rows
    assert type(model.width) is int
    model(torch.randn(2, 3))
