"""The random generator while a module is compared, measured or refitted: the same draws, and nothing of it left."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def seeded(module: nn.Module) -> Iterator[None]:
    """Draws of the CPU and of the module's devices as after `manual_seed(0)`; generators go on afterwards as before."""
    devices = {tensor.device.index for tensor in module.parameters() if tensor.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices)):
        torch.manual_seed(0)
        yield
