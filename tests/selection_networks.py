"""Random networks that select, reorder and share: strides, chunks, shuffles, equations, layers called twice."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.random_networks import Call, ImageNetwork

Block = tuple[nn.Module, int]


class Contracted(nn.Module):
    """An equation with a weight, after what makes its operand of an image."""

    def __init__(self, equation: str, shape: tuple[int, ...], before: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.equation, self.before = equation, before
        self.weight = nn.Parameter(torch.randn(shape) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum(self.equation, x if self.before is None else self.before(x), self.weight)


class Experts(nn.Module):
    """Units of several experts on the same channels, averaged over the experts."""

    def __init__(self, inputs: int, outputs: int, batched: bool) -> None:
        super().__init__()
        self.batched = batched
        self.first, self.second = (nn.ParameterList([nn.Parameter(torch.randn(3, inputs, 6) / 2)]),
                                   nn.ParameterList([nn.Parameter(torch.randn(3, 6, outputs) / 2)]))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = x.flatten(2).transpose(1, 2).reshape(b * h * w, c)
        if self.batched:
            y = F.relu(torch.bmm(y.expand(3, -1, -1), self.first[0]))
            out = torch.bmm(y, self.second[0]).mean(0)
        else:
            y = F.relu(torch.einsum("bi,eih->beh", y, self.first[0]))
            out = torch.einsum("beh,eho->bo", y, self.second[0])
        return out.view(b, h * w, -1).transpose(1, 2).reshape(b, -1, h, w)


class Left(nn.Module):
    """A weight that stands on the left of the channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight @ x.flatten(2)).unflatten(2, x.shape[2:])


class SelectionNetwork(ImageNetwork):
    """Blocks that select and share, between those of `ImageNetwork`."""

    def block(self, n: int) -> Block:
        r = self.r
        draw = r.choice(
            [self._strided, self._parts, self._reordered, self._unbound, self._shuffled, self._equation,
             self._transposed, self._shared, self._shared, super().block]
        )  # fmt: skip
        return draw(n)

    def _reader(self, call: Callable[[Tensor], Tensor], n: int, left: int) -> Block:
        """A convolution of `n` channels, what `call` leaves of them, and one that reads these."""
        m = self.r.choice([4, 6, 8])
        return nn.Sequential(self.conv(n, n), Call(call), self.conv(left, m)), m

    def _strided(self, n: int) -> Block:
        step, start = self.r.choice([(2, 0), (2, 1), (3, 0), (3, 1)])
        if self.r.random() < 0.5:
            return self._reader(lambda x: x[:, start::step], n, len(range(start, n, step)))
        a, b = self.conv(len(range(0, n, 2)), 4), self.conv(len(range(1, n, 2)), 4)
        return Call(lambda x, a, b: torch.cat([a(x[:, ::2]), b(x[:, 1::2])], 1), a, b), 8

    def _parts(self, n: int) -> Block:
        first, last = sorted(self.r.sample(range(n + 1), 2))
        calls: list[tuple[Callable[[Tensor], Tensor], int]] = [
            (lambda x: x.chunk(2, 1)[1], n // 2),
            (lambda x: x.tensor_split(2, 1)[0], n - n // 2),
            (lambda x: x.split([1, n - 1], 1)[1], n - 1),
            (lambda x: x.narrow(1, first, last - first), last - first),
        ]
        call, left = self.r.choice(calls)
        return self._reader(call, n, left)

    def _reordered(self, n: int) -> Block:
        shift, order = self.r.randint(-n, n), self.r.sample(range(n), self.r.randint(2, n))
        return self.r.choice(
            [
                lambda: self._reader(lambda x: x.flip(1), n, n),
                lambda: self._reader(lambda x: x.flip((1, 3)), n, n),
                lambda: self._reader(lambda x: x.roll(shift, 1), n, n),
                lambda: self._reader(lambda x: x.roll((shift, 1), (1, 2)), n, n),
                lambda: self._reader(lambda x: x[:, order], n, len(order)),
            ]
        )()

    def _unbound(self, n: int) -> Block:
        some = self.r.sample(range(n), self.r.randint(2, n))
        half = n // 2
        return self.r.choice(
            [
                lambda: self._reader(lambda x: torch.stack([x.unbind(1)[i] for i in some], 1), n, len(some)),
                lambda: self._reader(lambda x: x[:, : 2 * half].unflatten(1, (2, half)).unbind(1)[1], n, half),
                lambda: self._reader(lambda x: torch.mul(*x[:, : 2 * half].unflatten(1, (half, 2)).unbind(2)), n, half),
                lambda: self._reader(lambda x: x[:, : 2 * half].unflatten(1, (2, half))[:, 0], n, half),
            ]
        )()

    def _shuffled(self, n: int) -> Block:
        m = self.r.choice([4, 6, 8])
        if self.r.random() < 0.5:
            return nn.Sequential(self.conv(n, 4 * m), nn.PixelShuffle(2), self.conv(m, m, 2)), m
        down = Call(lambda x: torch.cat([x[..., i::2, j::2] for i in range(2) for j in range(2)], 1))
        unshuffle = self.r.choice([nn.PixelUnshuffle(2), down])
        return nn.Sequential(nn.Upsample(scale_factor=2), unshuffle, self.conv(4 * n, m)), m

    def _equation(self, n: int) -> Block:
        m = self.r.choice([4, 6, 8])
        layer = self.r.choice(
            [
                lambda: Contracted("bchw,co->bohw", (n, m)),
                lambda: Contracted("bchw,oc->bohw", (m, n)),
                lambda: Contracted(
                    "bgchw,gco->bohw", (2, n // 2, m), lambda x: x[:, : n // 2 * 2].unflatten(1, (2, -1))
                ),
                lambda: nn.Sequential(Contracted("bchw,cgo->bgohw", (n, 2, m // 2)), nn.Flatten(1, 2)),
                lambda: nn.Sequential(Contracted("bchw,cgo->boghw", (n, 2, m // 2)), nn.Flatten(1, 2)),
                lambda: Experts(n, m, batched=True),
                lambda: Experts(n, m, batched=False),
                lambda: Left(n, m),
            ]
        )()
        return nn.Sequential(self.conv(n, n), layer, nn.ReLU(), self.conv(m, m)), m

    def _transposed(self, n: int) -> Block:
        count, step = self.r.choice([1, 2, 4, 8]), self.r.choice([1, 2])
        layer = nn.ConvTranspose2d(8, 8, 3, step, padding=1, output_padding=step - 1, groups=count,
                                   bias=self.r.random() < 0.5)  # fmt: skip
        return nn.Sequential(self.conv(n, 8), layer, *self.norm(8), nn.ReLU(), self.conv(8, 8, step)), 8

    def _shared(self, n: int) -> Block:
        m = self.r.choice([4, 6, 8])
        if self.r.random() < 0.5:
            body = self.conv(n, n, groups=self.r.choice([1, 2, n]))
            times = self.r.choice([2, 3])
            return nn.Sequential(Call(lambda x, a: [x := a(x) for _ in range(times)][-1], body), self.conv(n, m)), m
        body = self.conv(n // 2, m, groups=1)
        return (
            Call(lambda x, a: torch.cat([a(x[:, : n // 2]), a(x[:, n - n // 2 :])], 1), body),
            2 * m,
        )
