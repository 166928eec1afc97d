"""How a cost grows with the number of layers: seconds at each size, and the ratio to half the size before it.

What grows in proportion doubles at most; what walks the whole graph once for each layer comes near four times.

Run: python benchmarks/scaling.py [cost ...] [--sizes 50 100 200 400] [--rounds 2]
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import fxprune

# prepares a network of so many layers; what it returns is called once, timed
Cost = Callable[[int], Callable[[], object]]


def chain(layers: int) -> nn.Sequential:
    """So many linear layers of width 8, one after another."""
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))


def captured(layers: int) -> fxprune.TracedModule:
    """The chain, traced in both modes."""
    return fxprune.trace(chain(layers), (torch.randn(2, 8),))


def saved(traced: fxprune.TracedModule) -> Path:
    """The module in a file of its own, without graphs."""
    path = Path(tempfile.mkdtemp()) / "model.fxp"
    fxprune.save(traced, path, programs=False)
    return path


def load_masks(layers: int) -> Callable[[], object]:
    """A checkpoint with a mask on every weight, into the dense model."""
    path = saved(fxprune.prune.l1_unstructured(captured(layers), "*.weight", amount=0.5))
    return lambda: fxprune.load(path, chain(layers))


def load_masks_traced(layers: int) -> Callable[[], object]:
    """The same into the traced dense model: without the time of the capture."""
    traced = captured(layers)
    path = saved(fxprune.prune.l1_unstructured(captured(layers), "*.weight", amount=0.5))
    return lambda: fxprune.load(path, traced)


def load_carried(layers: int) -> Callable[[], object]:
    """A finalized checkpoint into a model that carries a mask on every weight, which is folded first."""
    path = saved(fxprune.finalize(captured(layers), shrink=False, verify=False))
    traced = fxprune.prune.l1_unstructured(captured(layers), "*.weight", amount=0.5)
    return lambda: fxprune.load(path, traced)


def load_norms(layers: int) -> Callable[[], object]:
    """A checkpoint with a weight norm on every weight, into the traced dense model."""
    traced, dense = captured(layers), captured(layers)
    for i in range(layers):
        fxprune.weight_norm(traced, f"{i}.weight")
    path = saved(traced)
    return lambda: fxprune.load(path, dense)


def convolutions(layers: int) -> fxprune.TracedModule:
    """So many convolutions of width 8 with a batch norm each, traced in both modes."""
    blocks = (nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(layers))
    return fxprune.trace(nn.Sequential(*blocks).eval(), (torch.randn(2, 8, 4, 4),))


def insert_masks(layers: int) -> Callable[[], object]:
    """A mask on every weight of a copy, by one call."""
    traced = captured(layers)
    return lambda: fxprune.prune.l1_unstructured(copy.deepcopy(traced), "*.weight", amount=0.5)


def remove_masks(layers: int) -> Callable[[], object]:
    """The masks of every weight of a copy made permanent, by one call."""
    traced = fxprune.prune.l1_unstructured(captured(layers), "*.weight", amount=0.5)
    return lambda: fxprune.prune.remove(copy.deepcopy(traced), "*.weight")


def fold_batch_norms(layers: int) -> Callable[[], object]:
    """Every batch norm folded into the convolution before it, in a copy."""
    traced = convolutions(layers)
    return lambda: fxprune.passes.FoldBatchNorm()(copy.deepcopy(traced))


def prune_channels(layers: int) -> Callable[[], object]:
    """Half of all channels masked, in a copy: the analysis of groups, scores, and the masks of all parameters."""
    traced = convolutions(layers)
    return lambda: fxprune.prune.channels(copy.deepcopy(traced), amount=0.5)


COSTS: dict[str, Cost] = {
    cost.__name__: cost
    for cost in (
        load_masks,
        load_masks_traced,
        load_carried,
        load_norms,
        insert_masks,
        remove_masks,
        fold_batch_norms,
        prune_channels,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("costs", nargs="*", choices=[*COSTS, []], default=[])
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 100, 200, 400])
    parser.add_argument("--rounds", type=int, default=2, help="of which the fastest counts")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in options.costs or COSTS:
        before = None
        for layers in options.sizes:
            call, seconds = COSTS[name](layers), []
            for _ in range(options.rounds):
                start = time.process_time()  # of this process alone: the machine may have other work
                call()
                seconds.append(time.process_time() - start)
            ratio = f"  x {min(seconds) / before:.2f}" if before else ""
            before = min(seconds)
            print(f"{name:20} {layers:5} layers {before:8.3f} s{ratio}", flush=True)


if __name__ == "__main__":
    main()
