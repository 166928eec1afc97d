"""Integers that forward does not read, and that another form of it does, fit after `write_back`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fxprune


class Block(nn.Module):
    """As C2f of ultralytics, which is exported by its `forward_split`."""

    def __init__(self, c: int = 16) -> None:
        super().__init__()
        self.c = c
        self.first, self.last = nn.Conv2d(3, 2 * c, 1), nn.Conv2d(3 * c, 4, 1)
        self.inner = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, c, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.first(x).chunk(2, 1))
        y.append(self.inner(y[-1]))
        return self.last(torch.cat(y, 1))

    def forward_split(self, x: Tensor) -> Tensor:
        a, b = self.first(x).split((self.c, self.c), 1)
        return self.last(torch.cat([a, b, self.inner(b)], 1))

    def forward_twice(self, x: Tensor) -> Tensor:
        return 2 * self.forward_split(x)


def test_the_attribute_that_another_form_reads_follows() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Block()).eval()
    x = torch.randn(2, 3, 6, 6)
    traced = fxprune.trace(model, x, modes=("eval",))
    fxprune.prune.channels(traced, 0.4, targets=["1.first", "1.inner.0"], round_to=1, runnable=model)
    small = fxprune.write_back(fxprune.finalize(traced), model)
    block = small[1]
    assert block.c == block.first.out_channels // 2 < 16
    inside = small[0](x)
    torch.testing.assert_close(block.forward_split(inside), block(inside))
    torch.testing.assert_close(small(x), traced(x))
    assert model[1].c == 16


class Own(Block):
    """A method of that name that computes something else, and one that wants other arguments, are left alone."""

    def forward_split(self, x: Tensor) -> Tensor:
        return super().forward_split(x) + self.c

    def forward_with(self, x: Tensor, scale: float) -> Tensor:
        return self.forward(x) * scale


def test_a_method_that_computes_something_else_says_nothing() -> None:
    model = Own().eval()
    traced = fxprune.trace(model, torch.randn(2, 3, 6, 6), modes=("eval",))
    fxprune.prune.channels(traced, 0.4, targets=["first", "inner.0"], round_to=1, runnable=model)
    assert fxprune.write_back(fxprune.finalize(traced), model).c == 16


class Resettable(nn.Module):
    """As the models of timm: how many features the head reads is a number that no call reads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features = 16
        first, last = nn.Sequential(nn.Linear(6, 16), nn.ReLU()), nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        self.body, self.fc = nn.Sequential(first, last), nn.Linear(16, 4)

    def reset_classifier(self, classes: int) -> None:
        self.fc = nn.Linear(self.num_features, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x))


def test_a_head_is_replaced_in_what_was_written_back_though_layers_of_its_width_have_several_now() -> None:
    model = Resettable().eval()
    traced = fxprune.trace(model, torch.randn(2, 6), modes=("eval",))
    fxprune.prune.channels(traced, 4, targets="body.0.0", round_to=1)
    fxprune.prune.channels(traced, 6, targets="body.1.0", round_to=1)
    small = fxprune.write_back(fxprune.finalize(traced), model)
    assert (small.num_features, small.body[0][0].out_features) == (10, 12)
    small.reset_classifier(3)
    assert small(torch.randn(2, 6)).shape == (2, 3)
