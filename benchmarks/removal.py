"""Removing half of the channels of a masked model against Torch-Pruning's build and prune, capture aside.

`finalize` also copies the model, folds the masks and runs both models to compare them; "analysis and rewriting" is the
part that Torch-Pruning does.

Run: python benchmarks/removal.py [rounds] [network ...]
"""

from __future__ import annotations

import copy
import time
from functools import partial

import torch
from command import names, prepare, rounds
from models import sample, vision
from pairs import report, timed
from peers import classifiers, magnitude_pruner
from torch import nn

import fxprune


def cut_by_peer(model: nn.Module, x: torch.Tensor) -> None:
    magnitude_pruner(model, x, 0.5, classifiers(model)).step()


def main() -> None:
    prepare()
    for name in names(("resnet50", "densenet201", "vit_b"), position=2):
        model, x = vision(name).eval(), sample(2)
        start = time.thread_time()
        traced = fxprune.trace(model, (x,))
        capture = time.thread_time() - start
        fxprune.prune.channels(traced, amount=0.5, scope="local", round_to=1)
        seconds: dict[str, list[float]] = {"analysis and rewriting": [], "fxprune.finalize": [], "Torch-Pruning": []}
        before, after = fxprune.finalize(traced).plan.macs
        for i in range(rounds(3) + 1):
            plain = fxprune.finalize(traced, shrink=False, verify=False)
            peer = copy.deepcopy(model)
            found = {
                "fxprune.finalize": timed(partial(fxprune.finalize, traced)),
                "analysis and rewriting": timed(partial(fxprune.passes.RemoveChannels(verify=False), plain)),
                "Torch-Pruning": timed(partial(cut_by_peer, peer, x)),
            }
            for key, value in found.items() if i else ():  # the first round warms up
                seconds[key].append(value)
        print(f"{name}: capture {capture:.2f} s; MACs left {after / before:.3f}")
        report(seconds)


if __name__ == "__main__":
    main()
