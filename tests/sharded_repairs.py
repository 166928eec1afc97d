"""What is measured and refitted of a network in one process and in several."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import fxprune
from tests import sharded_networks as networks

P = fxprune.prune
Spread = Callable[[fxprune.TracedModule], fxprune.TracedModule]


def without_biases() -> fxprune.TracedModule:
    """Layers whose outputs are far from zero, which a bias can make up for."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(12, 9, 1, bias=False), nn.ReLU(),
        nn.Flatten(2), nn.Linear(36, 5, bias=False),
    )  # fmt: skip
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.abs_()
    return fxprune.trace(model.train(), (networks.inputs(),))


def repaired(spread: Spread, what: str) -> dict[str, Any]:
    """States, curves and errors of a network whose channels went by curves, and which was refitted."""
    if dist.is_initialized():
        networks.keep_nothing_whole()
    module = spread(networks.traced() if what == "network" else without_biases())
    batches = [x.abs() + 1 for x in networks.batches()]
    if what != "network":
        P.ln_structured(module, "5.weight", 2, 2, 0)  # so that its bias has a mask
    sensitivity = fxprune.sensitivity(module, networks.mine(batches))
    P.channels(module, macs=0.6, importance=sensitivity, round_to=1)
    before = copy.deepcopy(networks.values(module))
    report = fxprune.reconstruct(module, networks.mine(batches))
    found = {"before": before, "state": networks.values(module)}
    found["curves"] = {"": torch.tensor([curve.losses().sum() for curve in sensitivity.curves])}
    readers = {name: replace(reader, seconds=0.0) for name, reader in report.readers.items()}
    found["told"] = {str(readers): torch.zeros(()), str(module.made_biases): torch.zeros(())}
    found["output"] = {"": module.eval()(networks.inputs(3)).detach()}
    try:
        fxprune.reconstruct(module, networks.mine(batches))
    except fxprune.errors.PruningError as error:
        found["again"] = {str(error): torch.zeros(())}
    optimizer = torch.optim.SGD(module.train().parameters(), lr=0.1)
    module(networks.inputs(0)).square().mean().backward()
    optimizer.step()
    found["trained"] = networks.values(module)
    found["final"] = networks.values(fxprune.finalize(module, keep_for_training=True))
    return found


def gradients_of_divided_batches(spread: Spread, groups: int) -> dict[str, torch.Tensor]:
    """The gradients of layers for which biases were made, where each group of processes has a part of the batch."""
    module = spread(without_biases())
    P.channels(module, macs=0.6, round_to=1)
    fxprune.reconstruct(module, [x.abs() + 1 for x in networks.batches()])
    assert module.made_biases
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    module.train()(networks.inputs(0).chunk(groups)[rank * groups // size]).square().mean().backward()
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}


def timed(spread: Spread) -> list[tuple[str, int]]:
    """The groups of which latencies are told, with their units."""
    table = fxprune.latency_table(spread(networks.traced()), most_seconds=5)
    return [(curve.name, curve.size) for curve in table.curves]
