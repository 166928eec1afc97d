"""Latency in onnxruntime, one thread: models cut to the MACs that Torch-Pruning reaches, against Torch-Pruning's own.

For each ratio: the dense model, Torch-Pruning's as it comes and with round_to=16 (exported by torch.onnx.export), and
fxprune's at the MACs of each; both take the same share of every layer. "half": both with half of every layer, so that
all channel counts are the same.

Run: python benchmarks/runtime.py [rounds] [network ...] [ratio ...] (a ratio may be "half")
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from command import names, prepare, rounds
from models import macs, sample, vision
from pairs import alternate
from peers import classifiers, magnitude_pruner
from torch import nn

import fxprune

RATIOS = ("half", "0.25", "0.35", "0.45", "0.55")


def peer(model: nn.Module, x: torch.Tensor, ratio: float, round_to: int | None) -> nn.Module:
    """Torch-Pruning's model; transformers lose heads and hidden units, not the width of the stream."""
    model = copy.deepcopy(model)
    options: dict[str, Any] = {}
    ignored = classifiers(model)
    projections = [m for n, m in model.named_modules() if n.endswith(("q_proj", "k_proj", "v_proj"))]
    if projections:
        options = {"num_heads": dict.fromkeys(projections, 12), "prune_num_heads": True, "prune_head_dims": False}
        options["head_pruning_ratio"] = ratio
        ends = ("o_proj", "fc2")
        ignored += [m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) or n.endswith(ends)]
    magnitude_pruner(model, x, ratio, ignored, round_to=round_to, **options).step()
    return model


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def race(name: str, ratio: str, turns: int, folder: Path) -> None:
    model, x = vision(name).eval(), sample(1)
    peers = {"Torch-Pruning": peer(model, x, 0.5 if ratio == "half" else float(ratio), None)}
    if ratio != "half":
        peers["Torch-Pruning, round_to=16"] = peer(model, x, float(ratio), 16)
    dense = macs(model, x)
    left = {"dense": 1.0}
    files = {"dense": folder / "dense.onnx"}
    traced = fxprune.trace(model, (sample(2),), modes=("eval",))
    kinds = ("attention head", "MLP unit") if name == "vit_b" else None
    fxprune.export.to_onnx(fxprune.finalize(traced, fold_batch_norm=True), files["dense"], verify=False)
    for label, other in peers.items():
        own = copy.deepcopy(traced)
        if ratio == "half":
            fxprune.prune.channels(own, 0.5, scope="local", kinds=kinds, round_to=1)
        else:
            fxprune.prune.channels(own, macs=macs(other, x) / dense, scope="local", kinds=kinds)
        final = fxprune.finalize(own, fold_batch_norm=True)
        files[label], files[f"fxprune at the MACs of {label}"] = (folder / f"{len(files) + i}.onnx" for i in range(2))
        torch.onnx.export(other.eval(), (x,), files[label], dynamo=True, verbose=False)
        fxprune.export.to_onnx(final, files[f"fxprune at the MACs of {label}"], verify=False)
        left[label] = macs(other, x) / dense
        left[f"fxprune at the MACs of {label}"] = final.plan.macs[1] / final.plan.macs[0]
    feed = x.numpy()
    sessions = {label: session(path) for label, path in files.items()}
    runs = {label: lambda s=s: s.run(None, {s.get_inputs()[0].name: feed}) for label, s in sessions.items()}
    seconds = alternate(runs, turns)
    print(f"{name}, ratio {ratio}")
    for label, times in seconds.items():
        speed = statistics.median(a / b for a, b in zip(seconds["dense"], times, strict=True))
        share = f"({speed * left[label]:.3f} of the MACs' reduction)"
        text = f"  {label}: MACs left {left[label]:.3f}, {speed:.2f} times faster than dense {share}"
        if label.startswith("fxprune"):
            other = seconds[label.removeprefix("fxprune at the MACs of ")]
            text += f", time {statistics.median(times) / statistics.median(other):.3f} of Torch-Pruning's"
        print(text, flush=True)


def main() -> None:
    prepare()
    given = names((), position=2)
    ratios = [a for a in given if a == "half" or a.startswith("0.")] or RATIOS
    for name in [a for a in given if a not in ratios] or ("resnet50", "mobilenetv2_w1", "densenet121", "vit_b"):
        for ratio in ratios:
            with tempfile.TemporaryDirectory() as folder:
                race(name, ratio, rounds(15), Path(folder))


if __name__ == "__main__":
    main()
