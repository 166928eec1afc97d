"""Tensors of two devices do not meet: shown with the meta device, on which torch checks operands as on every other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxprune
from fxprune.artifacts.working_copy import WorkingCopy
from fxprune.artifacts.writing_back import beside
from fxprune.artifacts.zero_channels import ZeroChannels
from fxprune.errors import WriteBackError


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


@pytest.fixture
def final() -> fxprune.TracedModule:
    traced = fxprune.trace(network(), torch.randn(2, 4), modes=("eval",))
    return fxprune.finalize(fxprune.prune.channels(traced, 0.5, round_to=1) and traced, align=1)


def test_channels_come_back_as_zeros_where_the_copy_is(final: fxprune.TracedModule) -> None:
    root = network().to("meta")
    for name in ("0.weight", "0.bias", "2.weight"):
        root.get_parameter(name).data = final.get_parameter(name).detach().to("meta")
    channels = ZeroChannels(WorkingCopy(root, final))
    with channels.taken_back({"0.weight": {0: torch.arange(8)}}):
        assert root.get_parameter("0.weight").shape == (8, 4)
        assert root.get_parameter("0.weight").is_meta


def test_a_copy_goes_where_the_finalized_module_is(final: fxprune.TracedModule) -> None:
    assert all(tensor.is_meta for tensor in beside(final.to("meta"), network()).parameters())


def test_a_model_without_values_is_named(final: fxprune.TracedModule) -> None:
    with pytest.raises(WriteBackError, match=r"0\.weight, 0\.bias.* of the given Sequential are on the meta device"):
        fxprune.write_back(final, network().to("meta"))
