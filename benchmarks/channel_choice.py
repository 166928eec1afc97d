"""Choosing and masking half of the channels, capture aside, against Torch-Pruning's build and prune; CPU seconds.

Run: python benchmarks/channel_choice.py [rounds] [network ...]
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from command import names, prepare, rounds
from models import sample, vision
from pairs import report, timed
from peers import classifiers, magnitude_pruner
from torch import nn

import fxprune


def peer(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    return lambda: magnitude_pruner(model, x, 0.5, classifiers(model), global_pruning=True).step()


def main() -> None:
    prepare()
    for name in names(("resnet50", "densenet201", "vit_b"), position=2):
        model, x = vision(name).eval(), sample(2)
        traced = fxprune.trace(model, (x,))
        seconds: dict[str, list[float]] = {"fxprune": [], "Torch-Pruning": []}
        for _ in range(rounds(5)):
            fresh = copy.deepcopy(traced)
            candidates = {
                "fxprune": lambda fresh=fresh: fxprune.prune.channels(fresh, 0.5),  # type: ignore[misc]
                "Torch-Pruning": peer(copy.deepcopy(model), x),
            }
            for key, run in candidates.items():
                seconds[key].append(timed(run))
        print(name)
        report(seconds)


if __name__ == "__main__":
    main()
