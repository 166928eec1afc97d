"""Choosing and masking half of the channels, capture aside, against Torch-Pruning's build and prune; CPU seconds.

Run: python benchmarks/channel_choice.py [rounds] [network ...]
"""

from __future__ import annotations

import copy
import gc
import sys
import time
import warnings
from collections.abc import Callable

import torch
from models import magnitude_pruner, sample, vision
from pairs import report
from torch import nn

import fxprune


def peer(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    heads = [m for m in model.modules() if getattr(m, "out_features", 0) == 1000]
    return lambda: magnitude_pruner(model, x, 0.5, heads, global_pruning=True).step()


def main() -> None:
    warnings.simplefilter("ignore")  # Torch-Pruning's own
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    for name in sys.argv[2:] or ("resnet50", "densenet201", "vit_b"):
        model, x = vision(name).eval(), sample(2)
        traced = fxprune.trace(model, (x,))
        seconds: dict[str, list[float]] = {"fxprune": [], "Torch-Pruning": []}
        for _ in range(rounds):
            fresh = copy.deepcopy(traced)
            candidates = {
                "fxprune": lambda fresh=fresh: fxprune.prune.channels(fresh, 0.5),  # type: ignore[misc]
                "Torch-Pruning": peer(copy.deepcopy(model), x),
            }
            for key, run in candidates.items():
                gc.collect()
                start = time.thread_time()
                run()
                seconds[key].append(time.thread_time() - start)
        print(name)
        report(seconds)


if __name__ == "__main__":
    main()
