"""The random generator while a module is compared, measured or refitted: the same draws, and nothing of it left."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def generators_of(module: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Let torch's generators of the CPU and of a module's CUDA devices go on afterwards as before."""
    devices = {t.device.index for t in (*module.parameters(), *module.buffers()) if t.is_cuda}
    return torch.random.fork_rng(devices=sorted(devices))


@contextlib.contextmanager
def seeded(module: nn.Module) -> Iterator[None]:
    """Draws of the CPU and of the module's devices as after `manual_seed(0)`; generators go on afterwards as before."""
    with generators_of(module):
        torch.manual_seed(0)
        yield
