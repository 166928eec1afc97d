"""Modules that are spread over processes are measured and refitted as those of one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

import fxprune
from tests import sharded_networks as networks
from tests import sharded_repairs as repairs
from tests.processes import in_processes

State = dict[str, torch.Tensor]
Spread = Callable[[fxprune.TracedModule], fxprune.TracedModule]


def assert_same(want: Mapping[str, State], got: Mapping[str, State]) -> None:
    assert got.keys() == want.keys()
    for what, state in want.items():
        assert got[what].keys() == state.keys(), what
        for name, value in state.items():
            if what in {"trained", "final"}:  # gradients are added up in another order
                assert torch.allclose(got[what][name], value, rtol=0, atol=1e-6), f"{what}: {name}"
            else:
                assert torch.equal(got[what][name], value), f"{what}: {name}"


@pytest.fixture(scope="module", params=["network", "layers without biases"])
def of_one_process(request: pytest.FixtureRequest) -> tuple[str, dict[str, State]]:
    want = repairs.repaired(networks.plain, request.param)
    assert any(
        not torch.equal(value, want["before"][name]) for name, value in want["state"].items() if name in want["before"]
    )
    return request.param, want


def test_biases_are_made_where_there_were_none(of_one_process: tuple[str, dict[str, State]]) -> None:
    what, want = of_one_process
    made = want["state"].keys() - want["before"].keys()
    assert bool(made) == (what != "network")


def test_a_spread_module_is_refitted_to_the_same_bits(
    of_one_process: tuple[str, dict[str, State]], alone: None
) -> None:
    what, want = of_one_process
    assert_same(want, repairs.repaired(networks.by_fsdp, what))


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "spread"), [(2, networks.by_fsdp), (4, networks.by_tensor_parallel)])
def test_several_processes_refit_to_the_same_bits_with_batches_divided(
    of_one_process: tuple[str, dict[str, State]], processes: int, spread: Spread
) -> None:
    what, want = of_one_process
    for got in in_processes(processes, repairs.repaired, spread, what):
        assert_same(want, got)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "spread"), [(2, networks.by_fsdp), (4, networks.by_tensor_parallel)])
def test_biases_that_were_made_have_the_gradient_of_the_whole_batch(processes: int, spread: Spread) -> None:
    want = repairs.gradients_of_divided_batches(networks.plain, 1)
    for got in in_processes(processes, repairs.gradients_of_divided_batches, spread, 2):
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert torch.allclose(got[name], value, rtol=0, atol=1e-6), name


@pytest.mark.slow
def test_latencies_are_told_of_the_groups_of_one_process(alone: None) -> None:
    want = [(group.name, group.size) for group in fxprune.channel_groups(networks.traced()) if group.reason is None]
    assert sorted(repairs.timed(networks.by_fsdp)) == sorted(want)


def test_a_reference_that_is_spread_is_refused_and_one_that_is_whole_is_approached(alone: None) -> None:
    module, whole = networks.by_fsdp(networks.traced()), networks.traced()
    fxprune.prune.channels(module, macs=0.6)
    with pytest.raises(fxprune.errors.ShardingError, match="Give one that the first process has whole"):
        fxprune.reconstruct(module, networks.batches(), reference=networks.by_fsdp(networks.traced()))
    want = networks.traced()
    fxprune.prune.channels(want, macs=0.6)
    reports = [fxprune.reconstruct(each, networks.batches(), reference=whole) for each in (module, want)]
    assert reports[0].readers.keys() == reports[1].readers.keys()
    for name, value in networks.values(want).items():
        assert torch.equal(networks.values(module)[name], value), name


def test_what_is_wrong_with_batches_is_told_and_changes_nothing(alone: None) -> None:
    module = networks.by_fsdp(networks.traced())
    fxprune.prune.channels(module, macs=0.6)
    before = networks.values(module)
    with pytest.raises(fxprune.errors.ArgumentError, match="at least 2 are needed"):
        fxprune.reconstruct(module, [networks.inputs()[:1]])
    with pytest.raises(fxprune.FxpruneError):
        fxprune.sensitivity(module, [torch.ones(2, 2)])
    for name, value in networks.values(module).items():
        assert torch.equal(before[name], value), name
