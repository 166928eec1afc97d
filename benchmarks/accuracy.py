"""Accuracy on scikit-learn's digits at the MACs that Torch-Pruning reaches, after the same fine-tuning steps.

Per seed: one network is trained; Torch-Pruning and fxprune prune it by L2 magnitude to the same MACs, and both are
trained on over the same batches.

Run: python benchmarks/accuracy.py [ratio] [seeds]
"""

from __future__ import annotations

import copy
import statistics

import torch
from command import argument, prepare, rounds
from models import macs
from peers import magnitude_pruner
from sklearn.datasets import load_digits
from trained_networks import accuracy, train

import fxprune
from fxprune.demo import DigitNet

EPOCHS, FINE_TUNING = 15, 5


def main() -> None:
    prepare()
    ratio = argument(1, 0.6)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    found: dict[str, list[float]] = {"dense": [], "Torch-Pruning": [], "fxprune": []}
    left: dict[str, list[float]] = {"Torch-Pruning": [], "fxprune": []}
    for seed in range(rounds(5, position=2)):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        test, own = order[:600], order[600:]
        torch.manual_seed(seed)
        dense = DigitNet()
        train(dense, images[own], labels[own], EPOCHS, 0.05, seed)
        found["dense"].append(accuracy(dense, images[test], labels[test]))
        example = images[:2]
        peer = copy.deepcopy(dense)
        magnitude_pruner(peer, example, ratio, [peer.head], global_pruning=True).step()
        share = macs(peer, example) / macs(dense, example)
        traced = fxprune.trace(copy.deepcopy(dense), (example,))
        fxprune.prune.channels(traced, macs=share, round_to=1)
        final = fxprune.finalize(traced, align=1)
        left["Torch-Pruning"].append(share)
        left["fxprune"].append(macs(final.eval(), example) / macs(dense, example))
        for label, model in (("Torch-Pruning", peer), ("fxprune", final)):
            train(model, images[own], labels[own], FINE_TUNING, 0.02, seed + 100)
            found[label].append(accuracy(model, images[test], labels[test]))
    for label, values in found.items():
        rest = f", MACs left {statistics.mean(left[label]):.3f}" if label in left else ""
        print(f"{label}: {statistics.mean(values):.4f} (standard deviation {statistics.stdev(values):.4f}){rest}")


if __name__ == "__main__":
    main()
