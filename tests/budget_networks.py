"""Networks of several families and widths, for budgets of channels: each a model in eval mode and its inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _conv(n: int, m: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(n, m, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(m), nn.ReLU())


def plain_cnn(width: int) -> nn.Module:
    body = _conv(3, width), _conv(width, 2 * width), _conv(2 * width, 2 * width, 1)
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 5))


class Inverted(nn.Module):
    """Pointwise, depthwise, pointwise, with a shortcut."""

    def __init__(self, n: int, inner: int) -> None:
        super().__init__()
        self.up, self.deep = _conv(n, inner, 1), _conv(inner, inner, 3, inner)
        self.down = nn.Sequential(nn.Conv2d(inner, n, 1, bias=False), nn.BatchNorm2d(n))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.deep(self.up(x)))


def depthwise(width: int) -> nn.Module:
    body = _conv(3, width), Inverted(width, 3 * width), Inverted(width, 6 * width), _conv(width, 4 * width, 1)
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 5))


class Block(nn.Module):
    """Attention and an MLP around a normalized stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.second(x))))


def transformer(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), Block(width, 4), Block(width, 8), nn.Linear(width, 5))


class RecurrentHead(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Conv1d(8, width, 3, padding=1), nn.ReLU())
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.hidden, self.head = nn.Linear(width, 2 * width), nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(self.front(x.transpose(1, 2)).transpose(1, 2))
        return self.head(F.relu(self.hidden(y[:, -1])))


class Tagger(nn.Module):
    """A recurrent layer both ways, of which every state is read, behind a convolution and before an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Conv1d(8, width, 3, padding=1), nn.BatchNorm1d(width), nn.ReLU())
        self.rnn = nn.LSTM(width, width, batch_first=True, bidirectional=True)
        self.hidden, self.head = nn.Linear(2 * width, width + 16), nn.Linear(width + 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rnn(self.front(x.transpose(1, 2)).transpose(1, 2))
        return self.head(F.relu(self.hidden(states)))


class Branches(nn.Module):
    """Branches that are joined, one of which is added to a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = _conv(3, width)
        self.one, self.three = _conv(width, width, 1), _conv(width, 2 * width)
        self.join, self.short = _conv(3 * width, 2 * width, 1), _conv(width, 2 * width, 1)
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.join(torch.cat([self.one(x), self.three(x)], 1)) + self.short(x)
        return self.head(y.mean((2, 3)))


def single(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 4, 1), nn.Flatten())


def _image() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def _tokens() -> Tensor:
    return torch.randn(2, 6, 8)


FAMILIES: dict[str, tuple[Callable[[int], nn.Module], Callable[[], Tensor]]] = {
    "cnn": (plain_cnn, _image),
    "depthwise": (depthwise, _image),
    "transformer": (transformer, _tokens),
    "recurrent": (RecurrentHead, _tokens),
    "tagger": (Tagger, _tokens),
    "branches": (Branches, _image),
    "single": (single, _image),
}


def network(family: str, width: int) -> tuple[nn.Module, Tensor]:
    """A network with random weights and statistics, and its inputs."""
    torch.manual_seed(0)
    build, inputs = FAMILIES[family]
    model = build(width).eval()
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if value.dim() == 1 and value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.5 if "weight" in name or "var" in name else value)
    return model, inputs()
