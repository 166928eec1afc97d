"""A budget of speed, with units weighed by what they save in MACs and in measured latency, by the same curves.

Trained networks: those of `trained_networks.py`, and one of inverted residuals, trained here on
scikit-learn's digits, whose early layers take more time than their MACs tell. For each speed both ways choose,
`fxprune.reconstruct` repairs, the network is judged on samples that nobody has seen, and the files run in turns.

Run: python benchmarks/speed.py [network ...] [speedup ...]
"""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path

import torch
from command import names, prepare
from torch import Tensor, nn
from torch.nn import functional
from trained_networks import NETWORKS, FineTuning, Trained, accuracy, built, load_images, train

import fxprune
from fxprune import export


class Inverted(nn.Module):
    """Wider, then by depth, then narrower, around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        wide = 4 * inputs
        self.body = nn.Sequential(
            nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU(),
            nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.is_short = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.is_short else self.body(x)


class Images(nn.Module):
    """Digits made four times as large, inverted residuals at 32 x 32 down to 8 x 8, dense layers at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        sizes = ((16, 24, 1), (24, 32, 2), (32, 64, 2))
        self.body = nn.Sequential(*(Inverted(*each) for each in sizes))
        self.late = nn.Sequential(nn.Conv2d(64, 128, 3, 1, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(128, 128, 3, 1, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU())
        self.head = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.last(self.late(self.body(self.stem(images)))).mean((2, 3)))


def inverted(samples: int, seed: int = 0) -> Trained | None:
    """Inverted residuals, trained here; the score is the accuracy on 600 digits that nobody has seen."""
    images, labels, test, own = load_images(seed)
    images = functional.interpolate(images, scale_factor=4, mode="bilinear")
    torch.manual_seed(seed)
    model = Images()
    train(model, images[own], labels[own], epochs=6, rate=0.05, seed=seed)

    def loss(logits: Tensor, wanted: Tensor) -> Tensor:
        return functional.cross_entropy(logits, wanted, reduction="none")

    return Trained(
        model, {"images": images[own[:samples]]}, labels[own[:samples]],
        lambda network: accuracy(network, images[test], labels[test]), loss, loss, (model.head,), FineTuning(0, 1, ()),
    )  # fmt: skip


def run(name: str, network: Trained, speedups: list[float], folder: Path) -> None:
    traced = fxprune.trace(copy.deepcopy(network.model), (), network.first(2), modes=("eval",))
    sensitivity = fxprune.sensitivity(traced, network.batches(), weight=network.weight)
    table = fxprune.latency_table(traced)
    print(f"{name}: dense {network.score(network.model):.4f}\n{table.table()}", flush=True)
    dense = folder / "dense.onnx"
    export.to_onnx(fxprune.finalize(traced), dense, verify=False)
    for speedup in speedups:
        paths, told = [dense], []
        for prices in ("macs", table):
            way = prices if isinstance(prices, str) else "latency"
            candidate = copy.deepcopy(traced)
            begin = time.perf_counter()
            report = fxprune.prune.channels(candidate, speedup=speedup, importance=sensitivity, prices=prices)
            seconds = time.perf_counter() - begin
            fxprune.reconstruct(candidate, network.batches(), weight=network.weight)
            paths.append(folder / f"{way}.onnx")
            export.to_onnx(fxprune.finalize(candidate), paths[-1], verify=False)
            lost = network.score(candidate.eval())
            told.append(
                f"repaired {lost:.4f}, MACs {report.macs[1] / report.macs[0]:.3f}, reported {report.speedup:.3f}, "
                f"chosen in {seconds:.0f} s, {[gone for gone, _ in report.removed.values()]}"
            )
        reached = [1 / each.ratio for each in export.bench(paths, rounds=60)[1:]]
        for path, text, fast in zip(paths[1:], told, reached, strict=True):
            print(f"  {speedup} by {path.stem}: {fast:.3f} times faster, {text}", flush=True)


def main() -> None:
    prepare()
    given = names(("inverted", "recognizer", "1.5", "2.0"))
    speedups = [float(each) for each in given if each[0].isdigit()] or [1.5, 2.0]
    networks = NETWORKS | {"inverted": (inverted, 400)}
    for name in (each for each in given if not each[0].isdigit()):
        network = built(name, networks=networks)
        if network is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            run(name, network, speedups, Path(folder))


if __name__ == "__main__":
    main()
