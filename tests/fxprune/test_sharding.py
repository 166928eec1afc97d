"""Modules that several processes hold parts of: masks are those of one process, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

import fxprune
from tests import sharded_networks as networks
from tests.processes import in_processes

Spread = Callable[[fxprune.TracedModule], fxprune.TracedModule]
State = dict[str, torch.Tensor]


def assert_equal(want: Mapping[str, State], got: Mapping[str, State]) -> None:
    for what, state in want.items():
        assert got[what].keys() == state.keys(), what
        for name, value in state.items():
            assert torch.equal(got[what][name], value), f"{what}: {name}"


def test_masks_of_two_processes_are_those_of_one_whatever_the_method_and_their_generators() -> None:
    want = networks.masks(networks.plain)
    for got in in_processes(2, networks.masks, networks.by_fsdp):
        assert_equal(want, got)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "spread"),
    [
        (3, networks.by_fsdp),
        (4, networks.by_fsdp),
        (4, networks.by_replicas),
        (2, networks.by_tensor_parallel),
        (4, networks.by_tensor_parallel),
    ],
)
def test_masks_are_those_of_one_process_on_any_mesh(processes: int, spread: Spread) -> None:
    want = networks.masks(networks.plain)
    for got in in_processes(processes, networks.masks, spread):
        assert_equal(want, got)


def assert_trained_alike(want: dict[str, State], got: dict[str, State]) -> None:
    assert got["state"].keys() == want["state"].keys()
    for name, value in (want["state"] | want["norms"]).items():
        found = (got["state"] | got["norms"])[name]
        if name.endswith("_mask"):
            assert torch.equal(found, value), name
        assert torch.allclose(found, value, rtol=0, atol=1e-6), name


def test_three_steps_with_clipping_and_masks_in_between_end_as_in_one_process() -> None:
    want = networks.trained(networks.plain)
    for got in in_processes(2, networks.trained, networks.by_fsdp):
        assert_trained_alike(want, got)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [networks.by_fsdp, networks.by_replicas])
def test_training_ends_as_in_one_process_on_any_mesh(spread: Spread) -> None:
    want = networks.trained(networks.plain)
    for got in in_processes(4, networks.trained, spread):
        assert_trained_alike(want, got)


def test_what_cannot_be_the_same_everywhere_is_refused_by_every_process_and_changes_nothing() -> None:
    for found in in_processes(2, networks.refusals):
        assert found["trace"].startswith("CaptureError: FSDPNetwork is sharded already")
        assert found["masks"].startswith("ShardingError: the mask for 'head.weight' is not the same on every process")
        assert found["masked"] == "False"


def test_channels_of_two_processes_are_those_of_one_by_every_importance_with_batches_divided() -> None:
    want = networks.channels(networks.plain)
    for got in in_processes(2, networks.channels, networks.by_fsdp):
        assert_equal(want, got)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [networks.by_fsdp, networks.by_replicas, networks.by_tensor_parallel])
def test_channels_are_those_of_one_process_on_any_mesh(spread: Spread) -> None:
    want = networks.channels(networks.plain)
    for got in in_processes(4, networks.channels, spread):
        assert_equal(want, got)


def assert_finalized_alike(processes: int, spread: Spread, how: str, folder: Path) -> None:
    for name in ("one", "several"):
        (folder / name).mkdir()
    want = networks.finalized(networks.plain, how, str(folder / "one"))
    for rank, got in enumerate(in_processes(processes, networks.finalized, spread, how, str(folder / "several"))):
        if how == "whole":
            assert got["device"].keys() == ({"{'meta'}"} if rank else {"{'cpu'}"})
        for what in got.keys() - {"device"}:
            assert got[what].keys() == want[what].keys(), what
            for name, value in want[what].items():
                assert torch.allclose(got[what][name], value, rtol=0, atol=1e-6), f"{what}: {name}"


def test_what_finalize_leaves_is_spread_trains_on_and_is_written_as_in_one_process(tmp_path: Path) -> None:
    assert_finalized_alike(2, networks.by_fsdp, "spread", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "spread", "how"),
    [
        (2, networks.by_fsdp, "whole"),
        (4, networks.by_fsdp, "spread"),
        (4, networks.by_replicas, "spread"),
    ],
)
def test_what_finalize_leaves_is_that_of_one_process_on_any_mesh(
    processes: int, spread: Spread, how: str, tmp_path: Path
) -> None:
    assert_finalized_alike(processes, spread, how, tmp_path)
