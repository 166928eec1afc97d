"""Random networks with a stream that is normalized everywhere, and channels of it that are zero, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.random_networks import ACTIVATIONS, Attention, Call


class ByHand(nn.Module):
    """A normalization as models write it themselves, with a gain and a shift."""

    def __init__(self, form: Callable[[Tensor, Tensor, Tensor], Tensor], width: int, shift: float = 0.0) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.full((width,), shift))
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, self.weight, self.bias)


def rms(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3))


def rms_around_one(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-3) * (1 + (w - 1)) + b


def centred(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return w * ((x - mean) / torch.sqrt((x - mean).pow(2).mean(-1, keepdim=True) + 1e-3)) + b


def by_deviation(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-3) + b


def by_variance(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
    return (x - mean) * torch.rsqrt(var + 1e-3) * w + b


def by_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.normalize(x, dim=-1, eps=1e-3) * w + b


def by_extremes(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x / (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True) + 1e-3) * w + b


def response(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    norm = x.norm(p=2, dim=1, keepdim=True)
    return x + torch.addcmul(b, w, x * (norm / (norm.mean(-1, keepdim=True) + 1e-3)))


FORMS = (rms, rms_around_one, centred, by_deviation, by_variance, by_norm, by_extremes, response)


def over_channels(x: Tensor, norm: nn.Module) -> Tensor:
    y: Tensor = norm(x.transpose(1, 2)).transpose(1, 2)
    return y


def norm(r: random.Random, width: int) -> nn.Module:
    """One of torch's norms over the last axis, or one by hand."""
    kind = r.random()
    if kind < 0.25:
        return nn.LayerNorm(width)
    if kind < 0.45:
        return nn.RMSNorm(width, eps=r.choice([None, 1e-3]))
    if kind < 0.6:
        return Call(over_channels, nn.GroupNorm(r.choice([1, 2, 4, width]), width))
    return ByHand(r.choice(FORMS), width)


class StreamNetwork(nn.Module):
    """Attention and feed-forward layers around a stream, normalized before or after them."""

    def __init__(self, r: random.Random) -> None:
        super().__init__()
        width = r.choice([8, 12, 16])
        self.first = nn.Linear(6, width, r.random() < 0.7)
        self.places = nn.Parameter(torch.randn(7, width))
        blocks: list[nn.Module] = []
        for _ in range(r.randint(1, 3)):
            block, inner = self.block(r, width), norm(r, width)
            before = r.random() < 0.6
            blocks.append(
                Call((lambda x, b, n: x + b(n(x))) if before else (lambda x, b, n: n(x + b(x))), block, inner)
            )
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.last = norm(r, width), nn.Linear(width, 5)
        self.pooled = r.random() < 0.3

    @staticmethod
    def block(r: random.Random, width: int) -> nn.Module:
        inner, kind = r.choice([6, 8]), r.choice(["attention", "mlp", "mlp", "response", "conv"])
        if kind == "attention":
            return Attention(r, width, r.choice([2, 4]))
        if kind == "conv":
            return Call(over_channels, nn.Conv1d(width, width, 3, padding=1, groups=r.choice([1, width])))
        between = [ByHand(response, inner)] if kind == "response" else []
        return nn.Sequential(nn.Linear(width, inner), r.choice(ACTIVATIONS)(), *between, nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.first(x) + self.places))
        y: Tensor = self.last(x.mean(1) if self.pooled else x)
        return y


def streams(seed: int) -> tuple[nn.Module, Callable[[int], Tensor]]:
    """A masked network in float64 and eval mode, and its inputs by batch size."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    model = StreamNetwork(r)
    width = model.last.in_features
    dead = [i for i in range(width) if r.random() < r.choice([0.3, 0.6])]
    thorough = r.random() < 0.8  # else something forgotten keeps channels, or all of them
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.copy_(torch.rand_like(p) + 0.5 if name.endswith("weight") else torch.randn_like(p))
        for name, p in model.named_parameters():
            axis = 1 if name == "places" else 0
            if name.startswith("last"):
                continue
            rows = dead if p.shape[axis] == width else [i for i in range(p.shape[axis]) if r.random() < 0.4]
            if thorough or r.random() < 0.9:
                p.index_fill_(axis, torch.tensor(rows, dtype=torch.long), 0)

    def inputs(batch: int) -> Tensor:
        return torch.randn(batch, 7, 6).to(next(model.parameters()).dtype)

    return model.double().eval(), inputs
