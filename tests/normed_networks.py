"""Networks that come with norms on their weights: a vocoder with weight norm, a discriminator with spectral norm."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

Norm = Callable[[nn.Module], nn.Module]


class _Dilated(nn.Module):
    """Residual pairs of convolutions, the first of each dilated."""

    def __init__(self, width: int, norm: Norm, kernel: int) -> None:
        super().__init__()
        self.first = nn.ModuleList(
            norm(nn.Conv1d(width, width, kernel, padding=kernel // 2 * gap, dilation=gap)) for gap in (1, 3)
        )
        self.second = nn.ModuleList(norm(nn.Conv1d(width, width, kernel, padding=kernel // 2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.first, self.second, strict=True):
            x = x + second(functional.leaky_relu(first(functional.leaky_relu(x, 0.1)), 0.1))
        return x


class Vocoder(nn.Module):
    """The generator of HiFi-GAN, small: from 8 mel bands to 8 samples a frame.

    Kong et al., "HiFi-GAN" (2020), https://arxiv.org/abs/2010.05646.
    """

    def __init__(self, norm: Norm, width: int = 32) -> None:
        super().__init__()
        self.pre = norm(nn.Conv1d(8, width, 7, padding=3))
        widths = [width, width // 2, width // 4]
        shapes = zip(widths, widths[1:], (8, 4), (4, 2), strict=False)
        self.ups = nn.ModuleList(norm(nn.ConvTranspose1d(a, b, k, s, (k - s) // 2)) for a, b, k, s in shapes)
        self.blocks = nn.ModuleList(
            nn.ModuleList(_Dilated(size, norm, kernel) for kernel in (3, 5)) for size in widths[1:]
        )
        self.post = norm(nn.Conv1d(widths[-1], 1, 7, padding=3))

    def forward(self, mel: Tensor) -> Tensor:
        x = self.pre(mel)
        for up, blocks in zip(self.ups, self.blocks, strict=True):
            x = up(functional.leaky_relu(x, 0.1))
            x = torch.stack([block(x) for block in blocks]).mean(0)
        return self.post(functional.leaky_relu(x)).tanh()


class Discriminator(nn.Module):
    """The residual discriminator of SN-GAN, small.

    Miyato et al., "Spectral Normalization for GANs" (2018), https://arxiv.org/abs/1802.05957.
    """

    def __init__(self, norm: Norm, width: int = 16) -> None:
        super().__init__()
        self.stem = norm(nn.Conv2d(3, width, 3, padding=1))
        self.convs = nn.ModuleList(
            nn.ModuleList(
                (norm(nn.Conv2d(a, b, 3, padding=1)), norm(nn.Conv2d(b, b, 3, padding=1)), norm(nn.Conv2d(a, b, 1)))
            )
            for a, b in ((width, width * 2), (width * 2, width * 2))
        )
        self.head = norm(nn.Linear(width * 2, 1))

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        for first, second, shortcut in self.convs:
            x = functional.avg_pool2d(second(first(x.relu()).relu()) + shortcut(x), 2)
        return self.head(x.relu().sum((2, 3)))
