"""Modules that several processes hold parts of: masks are those of one process, bit for bit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard

import fxprune
from tests import sharded_networks as networks
from tests import tensor_parallel_networks as tensor_parallel
from tests.processes import in_processes

Spread = Callable[[fxprune.TracedModule], fxprune.TracedModule]
State = dict[str, torch.Tensor]

MESHES = [
    networks.by_fsdp, networks.by_replicas, networks.by_tensor_parallel, tensor_parallel.by_partly_tensor_parallel
]  # fmt: skip


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
        (4, tensor_parallel.by_partly_tensor_parallel),
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


@pytest.mark.slow
def test_three_steps_with_clipping_and_masks_in_between_end_as_in_one_process() -> None:
    want = networks.trained(networks.plain)
    for got in in_processes(2, networks.trained, networks.by_fsdp):
        assert_trained_alike(want, got)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [*MESHES, tensor_parallel.by_hand])
def test_training_ends_as_in_one_process_on_any_mesh(spread: Spread) -> None:
    want = networks.trained(networks.plain)
    for got in in_processes(4, networks.trained, spread):
        assert_trained_alike(want, got)


@pytest.mark.slow
def test_what_cannot_be_the_same_everywhere_is_refused_by_every_process_and_changes_nothing() -> None:
    for found in in_processes(2, networks.refusals):
        assert found["trace"].startswith("CaptureError: FSDPNetwork is sharded already")
        assert found["masks"].startswith("ShardingError: the mask for 'head.weight' is not the same on every process")
        assert found["masked"] == "False"


def test_channels_of_two_processes_are_those_of_one_with_batches_divided() -> None:
    want = networks.channels(networks.plain, ("l2", "taylor"))
    for got in in_processes(2, networks.channels, networks.by_fsdp, ("l2", "taylor")):
        assert_equal(want, got)


@pytest.mark.slow
def test_channels_of_two_processes_are_those_of_one_by_every_importance() -> None:
    want = networks.channels(networks.plain)
    for got in in_processes(2, networks.channels, networks.by_fsdp):
        assert_equal(want, got)


@pytest.mark.slow
@pytest.mark.parametrize("spread", MESHES)
def test_channels_are_those_of_one_process_on_any_mesh(spread: Spread) -> None:
    want = networks.channels(networks.plain)
    for got in in_processes(4, networks.channels, spread):
        assert_equal(want, got)


@pytest.mark.parametrize("processes", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
def test_scores_are_summed_up_where_the_weights_are_and_no_weight_comes(processes: int) -> None:
    importances = ("l2",) if processes == 2 else ("l1", "l2", "linf", "taylor")
    want, _ = networks.chosen_by_sums(networks.plain, importances)
    for rank, (got, sent) in enumerate(in_processes(processes, networks.chosen_by_sums, networks.by_fsdp, importances)):
        assert_equal(want, got)
        for importance, (received, given) in sent.items():
            # batches run through whole weights, forward and backward; gradients go back in parts
            assert received < (8.5 if importance == "taylor" else 0.5), (rank, importance)
            assert given < (4.5 if importance == "taylor" else 0.1), (rank, importance)


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
        (4, networks.by_tensor_parallel, "spread"),
        (4, networks.by_tensor_parallel, "whole"),
        (4, tensor_parallel.by_partly_tensor_parallel, "spread"),
        (4, tensor_parallel.by_hand, "spread"),
    ],
)
def test_what_finalize_leaves_is_that_of_one_process_on_any_mesh(
    processes: int, spread: Spread, how: str, tmp_path: Path
) -> None:
    assert_finalized_alike(processes, spread, how, tmp_path)


def assert_layers_alike(processes: int, spread: Spread, cut: str, **options: Any) -> None:
    want = tensor_parallel.layers_over_tensor_parallel(networks.plain, amount=options.get("amount", 0.4))
    call = functools.partial(tensor_parallel.layers_over_tensor_parallel, spread, **options)
    for got in in_processes(processes, call):
        assert got["cut"] == cut
        for what in ("trained", "final"):
            assert got[what].keys() == want[what].keys()
            for name, value in want[what].items():
                assert torch.allclose(got[what][name], value, rtol=0, atol=1e-6), f"{what}: {name}"


def test_tensor_parallel_layers_train_and_are_spread_again_as_they_were() -> None:
    assert_layers_alike(2, networks.by_tensor_parallel, "(Shard(dim=0), Shard(dim=1))")


_ROWS = "(_StridedShard(dim=0, sf=2), Shard(dim=0))"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "spread", "cut", "options"),
    [
        (2, networks.by_tensor_parallel, "(Shard(dim=0), Shard(dim=1))", {"as_dtensors": True}),
        (4, networks.by_tensor_parallel, "(Shard(dim=0), Shard(dim=1))", {"as_dtensors": True}),
        (4, networks.by_tensor_parallel, "(Shard(dim=0), Shard(dim=1))", {"groups": 2, "amount": 0.3}),
        (4, tensor_parallel.by_layers, _ROWS, {"as_dtensors": True, "groups": 2}),
        (4, tensor_parallel.by_named_axes, _ROWS, {"groups": 2, "amount": 0.3}),
        (4, tensor_parallel.by_named_axes, _ROWS, {"amount": 0.5}),
        (4, tensor_parallel.by_copies_of_shards, f"(Replicate(), {_ROWS[1:]}", {"groups": 2}),
        (4, tensor_parallel.by_four, "(_StridedShard(dim=0, sf=4), Shard(dim=0))", {"amount": 0.3}),
        (4, tensor_parallel.by_four, "(Shard(dim=0), Replicate())", {}),  # six rows would be two, two, two and none
    ],
)
def test_tensor_parallel_layers_of_any_mesh_are_spread_again(
    processes: int, spread: Spread, cut: str, options: dict[str, Any]
) -> None:
    assert_layers_alike(processes, spread, cut, **options)


@pytest.mark.slow
def test_one_file_of_two_processes_is_that_of_one_and_one_tensor_is_whole_at_a_time(tmp_path: Path) -> None:
    one, two = tmp_path / "one.fxp", tmp_path / "two.fxp"
    module = networks.plain(networks.traced())
    fxprune.prune.l1_unstructured(module, "*.weight", 0.3)
    fxprune.save(module, one)
    largest = max(tensor.nbytes for tensor in module.state_dict().values())
    found = in_processes(2, networks.saved_in_one, networks.by_fsdp, str(two))
    assert two.read_bytes() == one.read_bytes()
    for size, (counts,) in found:
        assert size > 3 * largest
        assert 0 < counts.gathered < 3 * size
        assert counts.sent == counts.parts == 0
    assert largest <= found[0][1][0].wholes <= 2 * largest


@pytest.mark.slow
@pytest.mark.parametrize("way", [networks.by_tensor_parallel, tensor_parallel.by_partly_tensor_parallel])
def test_what_tensor_parallel_processes_save_in_parts_others_load(tmp_path: Path, way: Spread) -> None:
    want = in_processes(4, networks.saved_in_parts, way, str(tmp_path))[0]
    for count, spread in ((4, way), (2, way), (3, networks.by_fsdp)):
        for found in in_processes(count, networks.loaded_in_parts, spread, str(tmp_path)):
            assert_equal(want, found)
    assert_equal(want, {name: networks.values(fxprune.load(tmp_path / name)) for name in want})


@pytest.mark.slow
def test_what_two_processes_save_in_parts_three_and_one_load(tmp_path: Path) -> None:
    want = in_processes(2, networks.saved_in_parts, networks.by_fsdp, str(tmp_path))[0]
    files = {name: len([*(tmp_path / name).glob("*.safetensors")]) for name in want}
    assert files["masked"] > 6
    assert files["final"] == 2
    found = in_processes(3, networks.loaded_in_parts, networks.by_fsdp, str(tmp_path))
    assert_equal(want, found[0])
    for name in want:
        loaded = fxprune.load(tmp_path / name)
        assert_equal({name: want[name]}, {name: networks.values(loaded)})
        fxprune.prune.l1_unstructured(loaded, "inner.weight", 2)
        output = loaded.eval()(networks.inputs(3))
        assert torch.allclose(found[0][f"{name}, output"][""], output, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "masked"]
    next((tmp_path / "final").glob("shard-00002*")).unlink()
    with pytest.raises(fxprune.errors.ArtifactError):
        fxprune.load(tmp_path / "final")


@pytest.mark.slow
def test_other_checkpoints_on_other_processes_are_refused_by_all(tmp_path: Path) -> None:
    for rank, found in enumerate(in_processes(2, networks.other_folders, str(tmp_path))):
        assert found["others"].startswith("ShardingError: the checkpoint '"), found
        assert found["none"].startswith("ArtifactError: " if rank else "ShardingError: process 1 failed"), found


@pytest.mark.slow
def test_parts_that_were_cut_short_are_no_checkpoint(tmp_path: Path) -> None:
    in_processes(2, networks.saved_in_parts, networks.by_fsdp, str(tmp_path))
    part = next((tmp_path / "final").glob("shard-00002*"))
    part.write_bytes(part.read_bytes()[:-8])
    with pytest.raises(fxprune.errors.ArtifactError):
        fxprune.load(tmp_path / "final")


@pytest.mark.slow
def test_a_module_of_which_some_parameters_are_whole_everywhere_is_as_in_one_process() -> None:
    want = networks.mixed(False)
    for got in in_processes(2, networks.mixed):
        assert_equal({"masked": want["masked"]}, got)
        for what in ("trained", "final"):
            assert got[what].keys() == want[what].keys()
            for name, value in want[what].items():
                assert torch.allclose(got[what][name], value, rtol=0, atol=1e-6), f"{what}: {name}"


@pytest.mark.slow
def test_meshes_that_have_no_axis_in_common_are_refused_by_every_process() -> None:
    for found in in_processes(4, tensor_parallel.over_unrelated_meshes):
        for what in ("channels", "finalize"):
            assert found[what].startswith("ShardingError: some of the module is spread over the processes"), found


@pytest.mark.slow
def test_values_that_one_process_lacks_are_missed_by_all() -> None:
    for rank, found in enumerate(in_processes(2, networks.some_without_values)):
        told = "ShardingError: a sharded parameter of shape" if rank else "ShardingError: process 1 failed"
        assert found["channels"].startswith(told), found
        assert found["finalize"].startswith(told), found


@pytest.mark.slow
def test_a_process_that_is_late_is_waited_for_as_long_as_the_time_out() -> None:
    found = in_processes(2, networks.late, seconds=5)[0]
    assert found["late"].startswith("ShardingError: global_unstructured(names='*.weight', ")
    assert "): the processes could not go on together: " in found["late"]


@pytest.mark.slow
def test_what_cannot_be_worked_on_is_refused_by_every_process(tmp_path: Path) -> None:
    for found in in_processes(2, networks.wrong_input, str(tmp_path)):
        for what, beginning in {
            "partial sums": "ShardingError: a parameter is stored as partial sums",
            "one loader fails": "ShardingError: the loader of process 0 failed: OSError: no such picture",
            "no folder": "ExportError: ",
            "other states": "ShardingError: 'stem.weight' of the state dict is not the same on every process",
            "write_back": "ShardingError: write_back was given a module that is spread over processes",
            "reconstruct": "ShardingError: the reference is spread over processes",
            "no values, reconstruct": "ShardingError: a sharded parameter of shape",
            "no parts": "ArtifactError: ",
            "nothing": "NameLookupError: ",
            "no values, masks": "ShardingError: a sharded parameter of shape",
            "no values, global": "ShardingError: a sharded parameter of shape",
            "no values, channels": "ShardingError: a sharded parameter of shape",
            "no values, finalize": "ShardingError: a sharded parameter of shape",
            "no group, masks": "ShardingError: gathering a parameter of a sharded module needs the process group",
            "no group, channels": "ShardingError: ",
            "no group, finalize": "ShardingError: ",
            "no group, save": "ShardingError: ",
        }.items():
            assert found[what].startswith(beginning), f"{what}: {found[what]}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "spread"),
    [(2, networks.by_fsdp), (4, networks.by_tensor_parallel), (4, tensor_parallel.by_hand)],
)
def test_norms_are_inserted_masked_trained_folded_and_removed_as_in_one_process(processes: int, spread: Spread) -> None:
    want = networks.normed(networks.plain)
    for got in in_processes(processes, networks.normed, spread):
        for what, state in want.items():
            assert got[what].keys() == state.keys(), what
            for name, value in state.items():
                assert torch.allclose(got[what][name], value, rtol=0, atol=1e-6), f"{what}: {name}"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_masks_hold_one_whole_parameter_at_a_time(processes: int) -> None:
    for found in in_processes(processes, networks.largest_held):
        assert found["of its mask"] == found["of its part"]
        assert found["whole tensors at once"] <= 4  # the values, scores, the mask of before and the new one


def test_a_block_is_not_sharded_by_itself_and_the_whole_is_afterwards(alone: None) -> None:
    module = networks.traced()
    with pytest.raises(fxprune.errors.CaptureError, match=r"shards the traced module as a whole: fully_shard\("):
        fully_shard(module.get_submodule("inner"))
    networks.by_fsdp(module)(networks.inputs()).sum().backward()
    fxprune.prune.channels(module, macs=0.6)
    assert_equal({"": networks.values(_chosen())}, {"": networks.values(module)})


def _chosen() -> fxprune.TracedModule:
    module = networks.traced()
    module(networks.inputs())
    fxprune.prune.channels(module, macs=0.6)
    return module
