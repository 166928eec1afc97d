"""What the tests of beginners' mistakes share: a small model, data, and the check that a refusal changes nothing."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune.errors import FxpruneError
from fxprune.graph.text import text

IMAGES, LABELS = torch.randn(4, 3, 8, 8), torch.randint(10, (4,))
LOADER = DataLoader(TensorDataset(torch.randn(8, 3, 8, 8), torch.randint(10, (8,))), 4)
L1 = torch_prune.L1Unstructured

Case = tuple[Callable[..., object], type[FxpruneError], str, str]


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3), nn.Flatten(), nn.Linear(64, 10)
    )


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(10, 4), nn.Linear(4, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(ids))


@contextlib.contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Assert that parameters, buffers, their values, names and order, attributes, hooks, modes and graphs stay."""
    before, values = state_of(module), {name: value.clone() for name, value in module.state_dict().items()}
    yield
    assert state_of(module) == before
    assert all(torch.equal(value, values[name]) for name, value in module.state_dict().items())


def state_of(module: nn.Module) -> list[Any]:
    parts = []
    for path, part in module.named_modules():
        tensors = [(name, id(t)) for held in (part._parameters, part._buffers) for name, t in held.items()]
        parts.append((path, type(part), part.training, tensors, sorted(vars(part)), len(part._forward_pre_hooks)))
    graphs = getattr(module, "graphs", {})
    return [parts, [(mode, text(graph)) for mode, graph in graphs.items()]]


def refused(case: Case, *arguments: object) -> None:
    call, error, mistake, cure = case
    with pytest.raises(error) as caught:
        call(*arguments)
    message = str(caught.value)
    assert re.search(mistake, message), message
    assert re.search(cure, message), message


def smaller(module: fxprune.TracedModule) -> fxprune.TracedModule:
    fxprune.prune.channels(module, 8, targets="0")
    return fxprune.finalize(module, verify=False)
