"""Random networks with random masks, drawn from a seed: what exact removal of channels is tried on."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.SiLU, nn.GELU, nn.Tanh, nn.Hardswish, nn.Softplus, nn.ELU, nn.Identity,
    lambda: nn.ReLU(inplace=True), lambda: nn.LeakyReLU(0.1), lambda: nn.Hardtanh(-0.3, 0.5),
]  # fmt: skip


class Call(nn.Module):
    """A function with parameters of its own."""

    def __init__(self, function: Callable[..., Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parts)


class Attention(nn.Module):
    """Self attention over tokens: fused, chunked or separate projections, few or all key heads, by hand or by torch."""

    def __init__(self, r: random.Random, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, r.choice([2, 3, 4])
        self.few = r.choice([heads, heads, 1]) if heads > 1 else 1
        self.form = r.choice(["separate", "chunk", "split", "unbind"]) if self.few == heads else "separate"
        self.manual = r.random() < 0.5
        inner, few = heads * self.size, self.few * self.size
        bias = r.random() < 0.7
        if self.form == "separate":
            self.q, self.k, self.v = (nn.Linear(width, n, bias) for n in (inner, few, few))
        else:
            self.qkv = nn.Linear(width, 3 * inner, bias)
        self.out = nn.Linear(inner, width, r.random() < 0.7)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        if self.form == "unbind":
            q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            if self.form == "separate":
                parts = self.q(x), self.k(x), self.v(x)
            elif self.form == "chunk":
                parts = self.qkv(x).chunk(3, -1)
            else:
                parts = self.qkv(x).split(self.heads * self.size, -1)
            q, k, v = (p.view(b, n, -1, self.size).transpose(1, 2) for p in parts)
        if self.few != self.heads:
            shape = b, self.few, self.heads // self.few, n, self.size
            k, v = (t[:, :, None].expand(shape).reshape(b, self.heads, n, self.size) for t in (k, v))
        if self.manual:
            y = torch.softmax(q @ k.transpose(-1, -2) / self.size**0.5, -1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, n, -1))


class Excite(nn.Module):
    def __init__(self, r: random.Random, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, max(2, width // 2), 1), nn.Conv2d(max(2, width // 2), width, 1)
        self.gate = r.choice([torch.sigmoid, F.hardsigmoid, torch.tanh])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Recurrent(nn.Module):
    def __init__(self, r: random.Random, width: int) -> None:
        super().__init__()
        kind = r.choice([nn.LSTM, nn.GRU])
        both = r.random() < 0.3
        self.rnn = kind(width, width, num_layers=r.choice([1, 2]), batch_first=True, bidirectional=both)
        self.out = nn.Linear(width * (2 if both else 1), width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])


class ImageNetwork(nn.Module):
    """Blocks drawn from convolutions of every kind, residual, concatenating, splitting and gated ones."""

    def __init__(self, r: random.Random) -> None:
        super().__init__()
        self.r = r
        width = r.choice([4, 6, 8])
        blocks: list[nn.Module] = [self.conv(3, width)]
        self.space = 8
        for _ in range(r.randint(2, 5)):
            block, width = self.block(width)
            blocks.append(block)
        self.blocks = nn.Sequential(*blocks)
        if r.random() < 0.25:
            self.head: nn.Module = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 5))
        else:
            self.head = nn.Sequential(Call(lambda x: x.mean((2, 3))), nn.Linear(width, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))

    def conv(self, n: int, m: int, stride: int = 1, groups: int = 1, act: bool = True, kernel: int = 0) -> nn.Module:
        r = self.r
        k = kernel or r.choice([1, 3, 3])
        mode = r.choice(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"])
        layers: list[nn.Module] = []
        padding = k // 2
        if k == 3 and r.random() < 0.15:
            layers.append(nn.ZeroPad2d(1))
            padding, mode = 0, "zeros"
        layers.append(nn.Conv2d(n, m, k, stride, padding, groups=groups, bias=r.random() < 0.5, padding_mode=mode))
        layers += self.norm(m)
        if act:
            layers.append(nn.PReLU(r.choice([1, m])) if r.random() < 0.1 else r.choice(ACTIVATIONS)())
        return nn.Sequential(*layers)

    def norm(self, width: int) -> list[nn.Module]:
        kind = self.r.random()
        if kind < 0.7:
            return [nn.BatchNorm2d(width)]
        if kind < 0.8:
            return [nn.InstanceNorm2d(width, affine=True)]
        return [nn.GroupNorm(2, width)] if kind < 0.84 else []

    def block(self, n: int) -> tuple[nn.Module, int]:
        r = self.r
        kind = r.choice(
            ["conv", "conv", "residual", "residual", "cat", "dense", "split", "shuffle", "depthwise", "multiplier",
             "grouped", "excite", "transposed", "pixel", "unpixel", "attention", "glu", "pool", "up", "scale",
             "pad_channels", "flip"]
        )  # fmt: skip
        m = r.choice([4, 6, 8])
        if kind == "residual":
            inner = r.choice([4, 6, 8])
            same = r.random() < 0.6
            body = nn.Sequential(self.conv(n, inner), self.conv(inner, n if same else m, act=False))
            short = nn.Identity() if same else self.conv(n, m, act=False, kernel=1)
            return nn.Sequential(
                Call(lambda x, a, b: a(x) + b(x), body, short), r.choice(ACTIVATIONS)()
            ), n if same else m
        if kind == "cat":
            a, b = self.conv(n, m), self.conv(n, 4)
            return Call(lambda x, a, b: torch.cat([a(x), b(x)], 1), a, b), m + 4
        if kind == "dense":
            return Call(lambda x, a: torch.cat([x, a(x)], 1), self.conv(n, 4)), n + 4
        if kind == "split":
            a, b = self.conv(n // 2, 4), self.conv(n - n // 2, 4)
            return Call(lambda x, a, b: torch.cat([a(x[:, : n // 2]), b(x[:, n // 2 :])], 1), a, b), 8
        if kind == "shuffle":
            mixed = nn.ChannelShuffle(2) if r.random() < 0.5 else Call(shuffle)
            return nn.Sequential(self.conv(n, 8), mixed, self.conv(8, m)), m
        if kind == "depthwise":
            return nn.Sequential(self.conv(n, n, groups=n, kernel=3), self.conv(n, m, kernel=1)), m
        if kind == "multiplier":
            return nn.Sequential(self.conv(n, 2 * n, groups=n, kernel=3), self.conv(2 * n, m, kernel=1)), m
        if kind == "grouped":
            grouped = self.conv(8, 4 * r.choice([1, 2]), groups=r.choice([2, 4]))
            return nn.Sequential(self.conv(n, 8, kernel=1), grouped, nn.LazyConv2d(m, 1)), m
        if kind == "excite":
            return Excite(r, n), n
        if kind == "transposed":
            groups = r.choice([1, 1, 2]) if n % 2 == 0 and m % 2 == 0 else 1
            layer = nn.ConvTranspose2d(n, m, 3, r.choice([1, 2]), padding=1, groups=groups, bias=r.random() < 0.5)
            return nn.Sequential(layer, *self.norm(m), r.choice(ACTIVATIONS)()), m
        if kind == "pixel":
            return nn.Sequential(self.conv(n, 4 * m), nn.PixelShuffle(2), nn.AvgPool2d(2)), m
        if kind == "unpixel":
            return nn.Sequential(nn.Upsample(scale_factor=2), nn.PixelUnshuffle(2), self.conv(4 * n, m)), m
        if kind == "attention":
            return nn.Sequential(self.conv(n, 8, kernel=1), Call(tokens, Attention(r, 8, r.choice([1, 2, 4])))), 8
        if kind == "glu":
            return nn.Sequential(self.conv(n, 2 * m, act=False), nn.GLU(1)), m
        if kind == "pool":
            pool = r.choice(
                [nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1, count_include_pad=False)]
            )
            return nn.Sequential(pool, self.conv(n, m)), m
        if kind == "up":
            return nn.Sequential(
                nn.Upsample(scale_factor=2, mode=r.choice(["nearest", "bilinear"])), self.conv(n, m, 2)
            ), m
        if kind == "scale":
            return Scale(n), n
        if kind == "pad_channels":
            return nn.Sequential(self.conv(n, n), Call(lambda x: F.pad(x, (0, 0, 0, 0, 0, 2)))), n + 2
        if kind == "flip":
            return nn.Sequential(Call(lambda x: x.flip(1) + x.roll(1, 1)), self.conv(n, m)), m
        return self.conv(n, m, r.choice([1, 1, 2])), m


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(width, 1, 1) + 0.5)
        self.shift = nn.Parameter(torch.randn(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain + self.shift


def shuffle(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


def tokens(x: Tensor, attend: nn.Module) -> Tensor:
    b, c, h, w = x.shape
    y: Tensor = attend(x.flatten(2).transpose(1, 2)).transpose(1, 2)
    return x + y.reshape(b, c, h, w)


class TokenNetwork(nn.Module):
    """Embeddings, attention, feed-forward layers and recurrent ones."""

    def __init__(self, r: random.Random) -> None:
        super().__init__()
        width = r.choice([4, 8])
        self.words = nn.Embedding(11, width)
        blocks: list[nn.Module] = []
        for _ in range(r.randint(1, 3)):
            kind = r.choice(["attention", "mlp", "mlp", "gated", "recurrent", "conv", "norm"])
            inner = r.choice([6, 8])
            if kind == "attention":
                blocks.append(Call(lambda x, a: x + a(x), Attention(r, width, r.choice([2, 4]))))
            elif kind == "mlp":
                mlp = nn.Sequential(nn.Linear(width, inner), r.choice(ACTIVATIONS)(), nn.Linear(inner, width))
                blocks.append(Call(lambda x, a: x + a(x), mlp))
            elif kind == "gated":
                up, gate, down = nn.Linear(width, inner), nn.Linear(width, inner, False), nn.Linear(inner, width)
                blocks.append(Call(lambda x, u, g, d: x + d(u(x) * F.silu(g(x))), up, gate, down))
            elif kind == "recurrent":
                blocks.append(Recurrent(r, width))
            elif kind == "conv":
                layer = nn.Conv1d(width, width, 3, padding=1, groups=r.choice([1, 2, width]))
                blocks.append(Call(lambda x, c: F.gelu(c(x.transpose(1, 2))).transpose(1, 2), layer))
            else:
                blocks.append(nn.LayerNorm(width))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.words(ids)).mean(1))


def network(
    seed: int, words: bool = False, kind: Callable[[random.Random], nn.Module] | None = None
) -> tuple[nn.Module, Callable[[int], Tensor]]:
    """A masked network in float64 and eval mode with random statistics, and its inputs by batch size.

    `words` draws one over tokens, else one over images, or of another `kind` over images.
    """
    r = random.Random(seed)
    torch.manual_seed(seed)
    model: nn.Module = TokenNetwork(r) if words else (kind or ImageNetwork)(r)

    def inputs(batch: int) -> Tensor:
        if words:
            return torch.randint(11, (batch, 7))
        return torch.randn(batch, 3, 8, 8).to(next(model.parameters()).dtype)

    with torch.no_grad():
        model(inputs(2))
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.copy_(torch.rand_like(p) + 0.5 if name.endswith("weight") else torch.randn_like(p))
        for b in model.buffers():
            if b.is_floating_point():
                b.copy_(torch.rand_like(b) + 0.5)
    mask(model, r)
    zero_units(model, random.Random(seed))
    return model.double().eval(), inputs


def mask(model: nn.Module, r: random.Random) -> None:
    """Zero rows (and sometimes columns) of weights; aligned masks fall on the same indices wherever sizes agree."""
    aligned, with_bias, with_beta = r.random() < 0.5, r.random() < 0.4, r.random() < 0.4
    share = r.choice([0.3, 0.5, 0.7])
    dead: dict[int, list[int]] = {}
    last: Any = [m for m in model.modules() if hasattr(m, "weight")][-1]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d):
                rows = dead.get(module.num_features, [])
                if aligned and with_beta:
                    module.bias[rows] = 0
            for name, p in module.named_parameters(recurse=False):
                if p.dim() < 2 or module is last or (isinstance(module, nn.Embedding) and r.random() < 0.5):
                    continue
                axis = 1 if isinstance(module, nn.ConvTranspose2d | nn.Embedding) else 0
                size = p.shape[axis]
                drawn = [i for i in range(size) if r.random() < share]
                rows = dead.setdefault(size, drawn) if aligned else drawn
                if r.random() < 0.85:
                    p.index_fill_(axis, torch.tensor(rows, dtype=torch.long), 0)
                    bias = getattr(module, "bias", None)
                    if with_bias and isinstance(bias, Tensor) and name == "weight" and len(bias) == size:
                        bias[rows] = 0
                if r.random() < 0.2:
                    columns = [i for i in range(p.shape[1 - axis]) if r.random() < share]
                    p.index_fill_(1 - axis, torch.tensor(columns, dtype=torch.long), 0)


def zero_units(model: nn.Module, r: random.Random) -> None:
    """Zero hidden units of recurrent layers, in half of the networks: all their rows and biases."""
    for layer in model.modules():
        if not isinstance(layer, nn.RNNBase) or r.random() < 0.5:
            continue
        for name, p in layer.named_parameters():
            if name.startswith("weight_ih"):  # others have the same rows
                gates = len(p) // layer.hidden_size
                units = [i for i in range(layer.hidden_size) if r.random() < 0.5]
                rows = [gate * layer.hidden_size + unit for gate in range(gates) for unit in units]
                suffix = name.partition("ih")[2]
                with torch.no_grad():
                    for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                        getattr(layer, kind + suffix)[rows] = 0
