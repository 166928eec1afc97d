"""Small networks that several test files use, each with a sample input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.inner_norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.inner_norm(self.inner(x))).relu()
        return self.head(self.drop(x.mean((2, 3))))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 7, num_layers=2, batch_first=True, dropout=0.1)
        self.out = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.lstm(x)[0][:, -1])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.layer(x))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.out = nn.Linear(8, 20)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.words(ids).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.GELU(), nn.Dropout(0.1), nn.Linear(12, 4))


# build, sample input, the parameters to prune
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], torch.Tensor], tuple[str, ...]]] = {
    "mlp": (mlp, lambda n: torch.randn(n, 6), ("0.weight", "4.weight", "0.bias")),
    "residual": (Residual, lambda n: torch.randn(n, 3, 6, 6), ("stem.weight", "inner.weight", "head.weight")),
    "lstm": (Recurrent, lambda n: torch.randn(n, 5, 6), ("lstm.weight_ih_l0", "lstm.weight_hh_l1", "out.weight")),
    "encoder": (Encoder, lambda n: torch.randn(n, 4, 8), ("layer.linear1.weight", "layer.self_attn.in_proj_weight")),
    "embedding": (Words, lambda n: torch.randint(20, (n, 4)), ("words.weight", "out.weight")),
}
