"""Models that hold one module in several places, which narrow with all of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fxprune


class Positions(nn.Module):
    """Depthwise convolutions, one for each part of the channels, as CoaT encodes positions."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = [8, 8]
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, size, padding=size // 2, groups=8) for size in (3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([conv(part) for conv, part in zip(self.convs, x.split(self.parts, 1), strict=True)], 1)


class Block(nn.Module):
    def __init__(self, positions: Positions) -> None:
        super().__init__()
        self.widen, self.positions, self.narrow = nn.Conv2d(6, 16, 1), positions, nn.Conv2d(16, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(self.positions(self.widen(x)).relu())


class Levels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions = Positions()
        self.first, self.second, self.head = Block(self.positions), Block(self.positions), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))


def test_a_module_in_several_places_comes_back_narrow_and_stays_one() -> None:
    torch.manual_seed(0)
    model, x = Levels().eval(), torch.randn(2, 6, 8, 8)
    traced = fxprune.trace(model, x, modes=("eval",))
    fxprune.prune.channels(traced, 0.5, round_to=1)
    small = fxprune.write_back(fxprune.finalize(traced), model)
    assert small.first.positions is small.second.positions is small.positions
    assert sum(small.positions.parts) == small.first.widen.out_channels == 8
    assert [conv.groups for conv in small.positions.convs] == small.positions.parts
    x = torch.randn(3, 6, 8, 8).double()
    torch.testing.assert_close(small.double()(x), traced.double()(x), rtol=1e-9, atol=1e-9)
