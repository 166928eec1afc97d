"""Under DDP, and where FSDP2 offloads to the CPU, what is pruned is what one process prunes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

import fxprune
from tests import replicated_networks as replicated
from tests import sharded_networks as networks
from tests.processes import in_processes

State = dict[str, torch.Tensor]


def assert_same(want: Mapping[str, State], got: Mapping[str, State]) -> None:
    assert got.keys() == want.keys()
    for what, state in want.items():
        assert got[what].keys() == state.keys(), what
        for name, value in state.items():
            assert torch.equal(got[what][name], value), f"{what}: {name}"


def assert_close(want: Mapping[str, State], got: Mapping[str, State]) -> None:
    """Masks to the bit, weights to 1e-6."""
    assert got.keys() == want.keys()
    for what, state in want.items():
        assert got[what].keys() == state.keys(), what
        for name, value in state.items():
            close = 0.0 if name.endswith("_mask") else 1e-6
            assert torch.allclose(got[what][name].double(), value.double(), rtol=0, atol=close), f"{what}: {name}"


def folder(path: Path, name: str) -> str:
    (path / name).mkdir()
    return str(path / name)


def test_a_network_under_ddp_is_trained_finalized_and_written_as_without(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    want = replicated.whole_way(folder(tmp_path, "one"))
    request.getfixturevalue("alone")
    assert_close(want, replicated.whole_way(folder(tmp_path, "ddp")))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_masks_channels_and_the_whole_way_under_ddp_are_those_of_one_process(processes: int, tmp_path: Path) -> None:
    masks, way = replicated.masks(), replicated.whole_way(folder(tmp_path, "one"))
    for got in in_processes(processes, replicated.all_ways, folder(tmp_path, "ddp")):
        assert_same(masks, got["masks"])
        assert_close(way, got["way"])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_the_whole_way_under_cpu_offload_is_that_of_one_process(processes: int, tmp_path: Path) -> None:
    masks, channels = networks.masks(networks.plain), networks.channels(networks.plain)
    trained = networks.trained(networks.plain)
    final = networks.finalized(networks.plain, "spread", folder(tmp_path, "one"))
    for got in in_processes(processes, replicated.all_ways_offloaded, folder(tmp_path, "offload")):
        assert_same(masks, got["masks"])
        assert_same(channels, got["channels"])
        assert_close(trained, got["trained"])
        assert_close(final, got["final"])


def test_training_and_finalize_under_cpu_offload_end_as_without(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    trained = networks.trained(networks.plain)
    final = networks.finalized(networks.plain, "spread", folder(tmp_path, "one"))
    request.getfixturevalue("alone")
    assert_close(trained, networks.trained(replicated.by_offload))
    assert_close(final, networks.finalized(replicated.by_offload, "spread", folder(tmp_path, "offload")))


def assert_computed_in_bfloat16(want: State, got: State) -> None:
    assert got.keys() == want.keys()
    assert want["output 1"].dtype is got["output 1"].dtype is torch.bfloat16
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def test_masks_are_gathered_in_the_dtype_of_mixed_precision(request: pytest.FixtureRequest) -> None:
    want = replicated.masked_in_mixed_precision(is_mixed=False)
    request.getfixturevalue("alone")
    assert_computed_in_bfloat16(want, replicated.masked_in_mixed_precision(is_mixed=True))


class _WithState(nn.Linear):
    """A layer whose input is added to a state that it makes in float32, as first states of recurrent layers are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + torch.zeros(self.in_features, dtype=torch.float32))


@pytest.mark.usefixtures("alone")
def test_what_mixed_precision_cannot_run_is_told_with_what_the_graph_has_written_into_it() -> None:
    def traced() -> fxprune.TracedModule:
        torch.manual_seed(0)
        return fxprune.trace(_WithState(4, 6), (torch.zeros(2, 4),), modes=("eval",))

    module, x = replicated.by_mixed_precision(traced()), torch.randn(2, 4)
    with pytest.raises(RuntimeError, match="dtype") as raised:
        module(x)
    (note,) = raised.value.__notes__
    assert re.search(r"brings parameters and inputs to torch.bfloat16.*%zeros.*has torch.float32 written", note), note
    with torch.autocast("cpu", torch.bfloat16):  # as it says
        assert torch.equal(networks.by_fsdp(traced())(x), traced()(x))


@pytest.mark.slow
def test_two_processes_compute_with_masks_in_mixed_precision_as_one() -> None:
    want = replicated.masked_in_mixed_precision(is_mixed=False)
    for got in in_processes(2, replicated.masked_in_mixed_precision, True):
        assert_computed_in_bfloat16(want, got)
