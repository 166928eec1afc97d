"""Removing half of the channels of a masked model against Torch-Pruning's build and prune, capture aside.

`finalize` also copies the model, folds the masks and runs both models to compare them; "analysis and rewriting" is the
part that Torch-Pruning does.

Run: python benchmarks/removal.py [rounds] [network ...]
"""

from __future__ import annotations

import copy
import gc
import sys
import time
import warnings

import torch
from models import magnitude_pruner, sample, vision
from pairs import report

import fxprune


def main() -> None:
    warnings.simplefilter("ignore")  # Torch-Pruning's own
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    for name in sys.argv[2:] or ("resnet50", "densenet201", "vit_b"):
        model, x = vision(name).eval(), sample(2)
        start = time.thread_time()
        traced = fxprune.trace(model, (x,))
        capture = time.thread_time() - start
        fxprune.prune.channels(traced, amount=0.5, scope="local", round_to=1)
        seconds: dict[str, list[float]] = {"analysis and rewriting": [], "fxprune.finalize": [], "Torch-Pruning": []}
        for _ in range(rounds + 1):
            gc.collect()
            start = time.thread_time()
            final = fxprune.finalize(traced)
            seconds["fxprune.finalize"].append(time.thread_time() - start)
            plain = fxprune.finalize(traced, shrink=False, verify=False)
            gc.collect()
            start = time.thread_time()
            fxprune.passes.RemoveChannels(check=False).apply(plain)
            seconds["analysis and rewriting"].append(time.thread_time() - start)
            peer = copy.deepcopy(model)
            heads = [m for m in peer.modules() if getattr(m, "out_features", 0) == 1000]
            gc.collect()
            start = time.thread_time()
            magnitude_pruner(peer, x, 0.5, heads).step()
            seconds["Torch-Pruning"].append(time.thread_time() - start)
        macs = final.plan.macs
        print(f"{name}: capture {capture:.2f} s; MACs left {macs[1] / macs[0]:.3f}")
        report({key: values[1:] for key, values in seconds.items()})


if __name__ == "__main__":
    main()
