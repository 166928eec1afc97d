"""A layer that gets the parameters of a smaller one has the attributes with which torch constructs the smaller one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxprune.artifacts.working_copy import follow_parameters
from fxprune.channels.registry import REGISTRY

# builds a layer from a number of inputs and of outputs
LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": nn.Linear,
    "embedding": nn.Embedding,
    "prelu": lambda i, o: nn.PReLU(o),
    "conv": lambda i, o: nn.Conv2d(i, o, 3),
    "grouped conv": lambda i, o: nn.Conv1d(i, o, 3, groups=2),
    "transposed conv": lambda i, o: nn.ConvTranspose2d(i, o, 3, groups=2),
    "batch norm": lambda i, o: nn.BatchNorm2d(o),
    "batch norm without weight": lambda i, o: nn.BatchNorm1d(o, affine=False),
    "batch norm without anything": lambda i, o: nn.BatchNorm1d(4, affine=False, track_running_stats=False),
    "instance norm": lambda i, o: nn.InstanceNorm2d(o, affine=True),
    "group norm": lambda i, o: nn.GroupNorm(o // 2, o),
    "layer norm": lambda i, o: nn.LayerNorm((3, o)),
    "rms norm": lambda i, o: nn.RMSNorm(o),
    "layer norm without weight": lambda i, o: nn.LayerNorm(4, elementwise_affine=False),
    "lstm": lambda i, o: nn.LSTM(i, o, num_layers=2),
    "lstm with projection": lambda i, o: nn.LSTM(i, o, proj_size=o // 2),
    "gru": lambda i, o: nn.GRU(i, o, bidirectional=True),
    "rnn": nn.RNN,
    "relu": lambda i, o: nn.ReLU(),
}


def integers(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if type(value) in (int, tuple)}


@pytest.mark.parametrize("name", LAYERS)
def test_attributes_are_those_of_torchs_constructor(name: str) -> None:
    large, small = LAYERS[name](12, 8), LAYERS[name](6, 4)
    large._parameters, large._buffers = small._parameters, small._buffers
    follow_parameters(large)
    assert integers(large) == integers(small)
    assert REGISTRY.module_sizes(small).items() <= vars(small).items()


def test_modules_of_other_classes_have_none() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.in_features = nn.Parameter(torch.ones(2, 2)), 9

    assert REGISTRY.module_sizes(Own()) == {}
