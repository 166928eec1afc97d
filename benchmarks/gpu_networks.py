"""Networks for a GPU that need nothing but torch: ResNet-50, ViT-B/16, and a block of Llama 3 8B; random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


class Bottleneck(nn.Module):
    """Three convolutions around a shortcut."""

    def __init__(self, inputs: int, inner: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * inner
        self.body = nn.Sequential(
            nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
            nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
            nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """He et al., Deep Residual Learning for Image Recognition (2015), table 1."""

    def __init__(self, width: int, depths: tuple[int, ...]) -> None:
        super().__init__()
        stem = (nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.stem, blocks, inputs = nn.Sequential(*stem), [], width
        for stage, depth in enumerate(depths):
            inner = width * 2**stage
            for i in range(depth):
                blocks.append(Bottleneck(inputs, inner, 2 if stage and not i else 1))
                inputs = 4 * inner
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(inputs, 1000)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(images)).mean((2, 3)))
        return logits


def heads_of(x: Tensor, size: int) -> Tensor:
    """[batch, positions, heads * size] as [batch, heads, positions, size]."""
    return x.view(x.size(0), x.size(1), -1, size).transpose(1, 2)


class VisionLayer(nn.Module):
    """Attention and an MLP, each behind a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.size = width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        parts = (heads_of(layer(y), self.size) for layer in (self.query, self.key, self.value))
        x = x + self.out(functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        y = self.down(functional.gelu(self.up(self.norm2(x))))
        return x + y


class ViT(nn.Module):
    """Dosovitskiy et al., An Image is Worth 16x16 Words (2020), without a class token: the mean is classified."""

    def __init__(self, width: int, heads: int, depth: int, positions: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.positions = nn.Parameter(0.02 * torch.randn(1, positions, width))
        self.layers = nn.Sequential(*(VisionLayer(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.layers(x)).mean(1))
        return logits


class LlamaBlock(nn.Module):
    """Grouped-query attention with rotary positions, and a gated MLP; Dubey et al., The Llama 3 Herd of Models (2024).

    Args:
        width: of the stream. heads: of queries. shared: of keys and values. hidden: units of the MLP.
        length: positions.
    """

    def __init__(self, width: int, heads: int, shared: int, hidden: int, length: int) -> None:
        super().__init__()
        self.size, narrow = width // heads, width // heads * shared
        self.norm1, self.norm2 = nn.RMSNorm(width, 1e-5), nn.RMSNorm(width, 1e-5)
        self.query, self.out = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.key, self.value = (nn.Linear(width, narrow, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)
        angles = torch.outer(torch.arange(length), 500000.0 ** -(torch.arange(0, self.size, 2) / self.size))
        self.register_buffer("cosine", torch.cat([angles, angles], 1).cos())
        self.register_buffer("sine", torch.cat([angles, angles], 1).sin())

    def turned(self, x: Tensor) -> Tensor:
        half = self.size // 2
        return x * self.cosine + torch.cat([-x[..., half:], x[..., :half]], -1) * self.sine

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        query, key, value = (heads_of(layer(y), self.size) for layer in (self.query, self.key, self.value))
        attended = functional.scaled_dot_product_attention(
            self.turned(query), self.turned(key), value, is_causal=True, enable_gqa=True
        )
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        y = self.down(functional.silu(self.gate(y)) * self.up(y))
        return x + y


@dataclass(frozen=True)
class Network:
    """A network to measure.

    Attributes:
        build: makes it. sample: inputs [batch, ...] in float32. heads: of layers by their last name.
    """

    build: Callable[[], nn.Module]
    sample: Callable[[int], Tensor]
    heads: dict[str, int]


def networks(small: bool) -> dict[str, Network]:
    """By name; `small` ones run everywhere in seconds."""
    side, length = (32, 8) if small else (224, 512)
    width = 64 if small else 4096
    return {
        "ResNet-50": Network(
            lambda: ResNet(16, (1, 1)) if small else ResNet(64, (3, 4, 6, 3)),
            lambda batch: torch.randn(batch, 3, side, side),
            {},
        ),
        "ViT-B/16": Network(
            lambda: ViT(64, 4, 3, 4) if small else ViT(768, 12, 12, 196),
            lambda batch: torch.randn(batch, 3, side, side),
            dict.fromkeys(("query", "key", "value"), 4 if small else 12),
        ),
        "Llama block": Network(
            lambda: LlamaBlock(width, 8, 2, 128, length) if small else LlamaBlock(width, 32, 8, 14336, length),
            lambda batch: torch.randn(batch, length, width),
            {"query": 8 if small else 32, **dict.fromkeys(("key", "value"), 2 if small else 8)},
        ),
    }
