"""Attention as it is written in many models, small."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS, SIZE, POSITIONS = 16, 4, 4, 5
SEPARATE = (
    "separate", "rows", "explicit", "scaled before", "einsum", "einsum of positions first", "shared by enable_gqa",
    "shared by repeat", "shared by expand", "rotary", "queries normalized", "keys read elsewhere",
    "lengths of keys read elsewhere", "keys read elsewhere by what returns integers", "one layer for both",
)  # fmt: skip
FUSED = ("chunk", "split", "unbind")


class Attention(nn.Module):
    """One attention and a layer behind."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling, self.shared = spelling, "shared" in spelling
        kv = 2 if self.shared else HEADS
        if spelling in FUSED:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        else:
            self.q, self.k, self.v = (nn.Linear(WIDTH, heads * SIZE) for heads in (HEADS, kv, kv))
        if spelling == "one layer for both":
            self.k = self.q
        self.norm = nn.LayerNorm(SIZE)
        self.out, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, positions, _ = x.shape
        if self.spelling == "einsum of positions first":
            q, k, v = (layer(x).view(batch, positions, HEADS, SIZE) for layer in (self.q, self.k, self.v))
            weights = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
            return self.head(self.out(torch.einsum("bhij,bjhd->bihd", weights, v).reshape(batch, positions, WIDTH)))
        q, k, v = self.heads(x)
        y = self.met(q, k, v).transpose(1, 2).reshape(batch, positions, WIDTH)
        y = self.out(y.view(-1, WIDTH)).view(batch, positions, -1) if self.spelling == "rows" else self.out(y)
        if self.spelling.startswith("keys read elsewhere"):
            y = y + k.transpose(1, 2).reshape(batch, positions, WIDTH)
        if self.spelling.startswith("lengths"):
            y = y + k.square().sum((1, 3))[..., None]
        y = self.head(y)
        return y.argmax(-1) if self.spelling.endswith("integers") else y

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        batch, positions, _ = x.shape
        if self.spelling == "unbind":
            return self.qkv(x).reshape(batch, positions, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
        if self.spelling in FUSED:
            fused = self.qkv(x)
            parts = fused.chunk(3, -1) if self.spelling == "chunk" else fused.split(WIDTH, -1)
        else:
            parts = self.q(x), self.k(x), self.v(x)
        q, k, v = (part.view(batch, positions, -1, SIZE).transpose(1, 2) for part in parts)
        if self.spelling == "queries normalized":
            q = self.norm(q)
        if self.spelling == "rotary":
            q, k = rotated(q), rotated(k)
        if self.spelling == "shared by repeat":
            k, v = (each.repeat_interleave(HEADS // 2, 1) for each in (k, v))
        if self.spelling == "shared by expand":
            k, v = (
                each[:, :, None].expand(batch, 2, HEADS // 2, positions, SIZE).reshape(batch, HEADS, positions, SIZE)
                for each in (k, v)
            )
        return q, k, v

    def met(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.spelling == "explicit":
            return (q @ k.transpose(-1, -2) / SIZE**0.5).softmax(-1) @ v
        if self.spelling == "scaled before":
            return ((q * SIZE**-0.5) @ k.transpose(-1, -2)).softmax(-1) @ v
        if self.spelling == "einsum":
            weights = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
            return torch.einsum("bhij,bhjd->bhid", weights, v)
        return functional.scaled_dot_product_attention(q, k, v, enable_gqa=self.spelling.endswith("enable_gqa"))


def rotated(x: Tensor) -> Tensor:
    """A rotary embedding."""
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=x.dtype)
    cosine, sine = (angles.cos().repeat(1, 2), angles.sin().repeat(1, 2))
    return x * cosine + torch.cat([-x[..., 2:], x[..., :2]], -1) * sine


class TorchsOwn(nn.Module):
    """`nn.MultiheadAttention`."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


def attention(spelling: str) -> tuple[nn.Module, Tensor]:
    """A network in float64 and 60 samples, whose channels are of different sizes."""
    torch.manual_seed(0)
    model = (TorchsOwn() if spelling == "torch's own" else Attention(spelling)).double().eval()
    scale = torch.logspace(0.7, -0.5, WIDTH, dtype=torch.float64)
    return model, torch.randn(60, POSITIONS, WIDTH, dtype=torch.float64) * scale


SPELLINGS = (*SEPARATE, *FUSED, "torch's own")
