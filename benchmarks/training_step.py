"""One training step of ResNet-18: torch's prune hooks, fxprune's mask nodes, and the dense eager model.

Run: python benchmarks/training_step.py [rounds]
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from command import rounds
from models import cnn
from pairs import alternate, report
from torch import nn
from torch.nn.utils import prune

import fxprune


def step(module: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), labels).backward()
        optimizer.step()

    return run


def main() -> None:
    dense = cnn("resnet18")
    x, labels = torch.randn(2, 3, 224, 224), torch.randint(1000, (2,))
    hooked, source = copy.deepcopy(dense), copy.deepcopy(dense)
    traced = fxprune.trace(source, (x,))
    for name, module in hooked.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            prune.l1_unstructured(module, "weight", amount=0.8)
            fxprune.prune.l1_unstructured(traced, f"{name}.weight", amount=0.8)
    models = {"dense eager": dense, "torch prune hooks": hooked, "fxprune mask nodes": traced}
    report(alternate({name: step(model, x, labels) for name, model in models.items()}, rounds(15)))


if __name__ == "__main__":
    main()
