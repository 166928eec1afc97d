"""Moments that several processes take side by side are those of one process, bit for bit."""

from __future__ import annotations

import pytest
import torch

from tests import sharded_moments as moments
from tests import sharded_networks as networks
from tests.processes import in_processes
from tests.sharded_repairs import Spread


def assert_measured_alike(processes: int, spread: Spread, what: str) -> None:
    want, pieces = moments.measured(networks.plain, what)
    rounds = -(-len(pieces) // processes)
    for rank, (got, added) in enumerate(in_processes(processes, moments.measured, spread, what)):
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert torch.equal(got[name], value), name
        assert len(added) == rounds
        assert sum(added) == len(pieces[rank::processes])


def test_each_of_two_processes_adds_its_pieces_and_curves_are_those_of_one() -> None:
    assert_measured_alike(2, networks.by_fsdp, "images")


@pytest.mark.slow
@pytest.mark.parametrize("what", moments.NETWORKS)
@pytest.mark.parametrize(
    ("processes", "spread"),
    [(2, networks.by_fsdp), (3, networks.by_fsdp), (4, networks.by_fsdp), (4, networks.by_replicas)],
)
def test_curves_are_those_of_one_process_on_any_mesh(processes: int, spread: Spread, what: str) -> None:
    assert_measured_alike(processes, spread, what)


@pytest.mark.slow
@pytest.mark.parametrize("what", moments.OTHERS)
def test_other_networks_are_chosen_by_curves_repaired_and_cut_as_in_one_process(what: str) -> None:
    want = moments.chosen(networks.plain, what)
    for got in in_processes(2, moments.chosen, networks.by_fsdp, what):
        assert got["curves"] == want["curves"]
        assert torch.allclose(got["output"], want["output"], rtol=0, atol=1e-5)


def test_control_flow_is_measured_and_repaired_around() -> None:
    found = moments.chosen(networks.plain, "control flow")
    assert all(measured[0] <= measured[-1] for _, measured in found["curves"])
    assert found["output"].shape == (6, 8)


@pytest.mark.slow
def test_a_batch_that_is_not_finite_is_told_as_in_one_process() -> None:
    for told in in_processes(2, moments.not_finite, False):
        assert told.startswith("PruningError: NaN or inf come up")


@pytest.mark.slow
def test_a_process_that_fails_ends_the_call_on_all_and_they_go_on_together() -> None:
    first, other = in_processes(2, moments.not_finite, True)
    assert first.startswith("ShardingError: process 1 failed: MemoryError: no room")
    assert other.startswith("MemoryError")
