"""Training a variant of the demo's network."""

from __future__ import annotations

import torch
from torch.nn import functional

import fxprune

from .data import Digits
from .progress import Step
from .variants import Variant

BATCH = 64
PRUNING = (0.1, 0.5)  # masks grow between these fractions of the epochs
RATE, FURTHER_RATE = 0.1, 0.02  # of a network from its start, and of one that is trained
FURTHER = 0.25  # share of the epochs for which a trained network goes on


def train(module: fxprune.TracedModule, data: Digits, variant: Variant, seed: int, epochs: int, step: Step) -> None:
    """Train in place with clipped gradients, pruning after each epoch as the variant says; leaves it in eval mode.

    A variant that starts from a trained network goes on for a share of the epochs, in smaller steps.
    """
    rate = FURTHER_RATE if variant.steps else RATE
    epochs = max(round(FURTHER * epochs), 1) if variant.steps else epochs
    generator = torch.Generator().manual_seed(seed)
    batches = len(data.images) // BATCH
    start, stop = (max(int(share * epochs) - 1, 0) for share in PRUNING)
    pruning = variant.schedule(module, start=start, stop=stop) if variant.schedule else None
    optimizer = torch.optim.SGD(module.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * batches, pct_start=0.2)
    module.train()
    with fxprune.clip_gradients(optimizer, max_norm=1.0):
        for epoch in range(1, epochs + 1):
            for batch in torch.randperm(len(data.images), generator=generator)[: batches * BATCH].split(BATCH):
                optimizer.zero_grad()
                functional.cross_entropy(module(data.images[batch]), data.labels[batch]).backward()
                optimizer.step()
                rates.step()
            if pruning:
                pruning.step()
            step(f"{variant.name}: train", epoch, epochs)
    module.eval()
