"""Global L1 selection over 100 million weights: torch's `global_unstructured` and fxprune's, CPU time and memory.

Extra memory is the highest resident memory during the call, less what was resident before it and the bytes of the
masks that it leaves; it needs Linux.

Run: python benchmarks/global_selection.py [millions of weights] [rounds]
"""

from __future__ import annotations

import multiprocessing
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from command import argument, rounds
from pairs import report
from torch import nn
from torch.nn.utils import prune

import fxprune

WIDTH = 2048


def resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def model(layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))


def torchs(layers: int) -> tuple[Callable[[], object], nn.Module]:
    source = model(layers)
    places = [(layer, "weight") for layer in source]
    return lambda: prune.global_unstructured(places, prune.L1Unstructured, amount=0.8), source


def fxprunes(layers: int) -> tuple[Callable[[], object], nn.Module]:
    traced = fxprune.trace(model(layers), (torch.randn(2, WIDTH),), modes=("eval",))
    names = [name for name, _ in traced.named_parameters()]
    return lambda: fxprune.prune.global_unstructured(traced, names, prune.L1Unstructured, amount=0.8), traced


def measure(name: str, layers: int) -> tuple[float, float, list[np.ndarray]]:
    """CPU seconds, extra bytes per parameter, and the masks as bits."""
    torch.set_num_threads(1)
    select, module = {"torch": torchs, "fxprune": fxprunes}[name](layers)
    Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark anew
    before, start = resident("VmRSS"), time.thread_time()
    select()
    seconds = time.thread_time() - start
    masks = [buffer for key, buffer in module.named_buffers() if key.endswith("_mask")]
    extra = resident("VmHWM") - before - sum(mask.nbytes for mask in masks)
    return seconds, extra / (layers * WIDTH**2), [np.packbits(mask.bool().numpy()) for mask in masks]


def main() -> None:
    layers = round(argument(1, 100) * 1e6 / WIDTH**2)
    seconds: dict[str, list[float]] = {"torch": [], "fxprune": []}
    print(f"{layers * WIDTH**2 / 1e6:.1f} million weights, 80 % to be masked")
    for _ in range(rounds(3, position=2)):
        masks = {}
        for name in seconds:
            # a process of its own: memory that an earlier run freed would hide what this one takes
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                taken, extra, masks[name] = pool.apply(measure, (name, layers))
            seconds[name].append(taken)
            kept = sum(int(np.bitwise_count(mask).sum()) for mask in masks[name])
            print(f"{name}: {taken:.2f} s, {extra:.2f} bytes of extra memory per parameter, {kept} weights kept")
        # of entries equal to the threshold torch keeps any, so all that differ must have one magnitude
        magnitudes = [
            layer.weight.detach().abs().flatten()[torch.from_numpy(np.unpackbits(a ^ b)).bool()]
            for layer, a, b in zip(model(layers), *masks.values(), strict=True)
        ]
        differing = torch.cat(magnitudes)
        assert len(differing.unique()) <= 1
        print(f"{len(differing)} entries differ, all of the threshold's magnitude")
    report(seconds)


if __name__ == "__main__":
    main()
