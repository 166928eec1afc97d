"""Masks of one axis that hold a vector: they act as those that hold all entries do, wherever they are read."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fxprune
from fxprune.errors import ArgumentTypeError, ShardingError
from fxprune.graph.expanded import is_expanded


def pair(layout: torch.memory_format = torch.contiguous_format) -> tuple[fxprune.TracedModule, fxprune.TracedModule]:
    """The same network, channels chosen alike; the first has compact masks, the other torch's."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2), nn.ReLU(),
        nn.Conv2d(6, 12, 1), nn.Flatten(), nn.Linear(12 * 36, 10), nn.ReLU(), nn.Linear(10, 4),
    ).to(memory_format=layout)  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    compact, full = (fxprune.trace(copy.deepcopy(model), x) for _ in range(2))
    for traced, is_compact in ((compact, True), (full, False)):
        fxprune.prune.channels(traced, 0.25, compact_masks=is_compact, round_to=1)
    return compact, full


X = torch.linspace(-1, 1, 3 * 3 * 64).reshape(3, 3, 8, 8)


def vectors(traced: nn.Module) -> list[str]:
    return [name for name, mask in traced.named_buffers() if name.endswith("_mask") and is_expanded(mask)]


def equal_states(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    alike = (a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(left.values(), right.values(), strict=True))
    return list(left) == list(right) and all(alike)


def test_they_hold_vectors_and_have_the_names_values_and_types_of_full_ones() -> None:
    compact, full = pair()
    assert "9.weight_mask" in vectors(compact)
    assert not vectors(full)
    assert equal_states(compact, full)
    assert [compact.get_buffer(name).untyped_storage().nbytes() for name in vectors(compact)] == [24, 40]
    assert not is_expanded(compact.get_buffer("7.weight_mask"))  # of rows and of columns


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_both_modes_and_gradients_are_the_same_bits(layout: torch.memory_format) -> None:
    compact, full = pair(layout)
    for mode in (False, True):
        outputs = [each.train(mode)(X) for each in (compact, full)]
        assert torch.equal(*outputs)
        for each in outputs:
            each.square().sum().backward()
    for (name, one), (_, other) in zip(compact.named_parameters(), full.named_parameters(), strict=True):
        assert one.grad is not None, name
        assert other.grad is not None, name
        assert torch.equal(one.grad, other.grad), name
    assert equal_states(compact, full)


def test_finalize_files_and_comparison_are_the_same(tmp_path: Path) -> None:
    compact, full = pair()
    assert equal_states(fxprune.finalize(compact), fxprune.finalize(full))
    assert fxprune.compare(full, compact, inputs=(X,)).ok
    fxprune.save(compact, tmp_path / "compact.fxp")
    assert equal_states(fxprune.load(tmp_path / "compact.fxp"), full)
    report = fxprune.export.to_onnx(compact.eval(), tmp_path / "masked.onnx")
    assert report.comparison is not None
    assert report.comparison.ok
    fxprune.export.to_program(compact, tmp_path / "masked.pt2")
    assert fxprune.compare(full.eval(), tmp_path / "masked.pt2", inputs=(X,)).ok
    file = io.BytesIO()
    torch.save(compact.state_dict(), file)
    assert file.tell() < 3 * sum(p.nbytes for p in compact.parameters())
    file.seek(0)
    full.load_state_dict(torch.load(file, weights_only=True))
    assert equal_states(compact, full)


def test_loading_lets_them_have_all_entries() -> None:
    compact, full = pair()
    changed = {name: value * 0 if name == "9.weight_mask" else value for name, value in full.state_dict().items()}
    own = compact.get_parameter("9.weight_orig")
    compact.load_state_dict(changed)
    assert not vectors(compact)
    assert compact.get_parameter("9.weight_orig") is own
    assert torch.equal(compact.eval()(X), compact.get_parameter("9.bias").expand(3, 4))
    again, _ = pair()
    part = again.get_submodule("9")
    part.load_state_dict({name: value * 0 for name, value in part.state_dict().items()})
    assert not again.get_buffer("9.weight_mask").any()
    assert "9.weight_mask" not in vectors(again)
    assert vectors(again)


def test_they_stay_vectors_in_copies_and_conversions() -> None:
    compact, full = pair()
    names = vectors(compact)
    wide = copy.deepcopy(compact).double()
    assert vectors(wide) == names
    assert equal_states(wide, copy.deepcopy(full).double())
    assert torch.equal(wide.eval()(X.double()), full.eval().double()(X.double()))
    with pytest.raises(RuntimeError, match="single memory location"):
        compact.get_buffer("9.weight_mask").mul_(0)


def test_further_masks_and_choices_act_as_on_full_ones() -> None:
    compact, full = pair()
    for each in (compact, full):
        with torch.no_grad():
            each.get_parameter("9.weight_orig").mul_(1.01)  # so that the choice goes on from the masks
        fxprune.prune.channels(each, 0.4, compact_masks=each is compact, round_to=1)
    assert "9.weight_mask" in vectors(compact)
    assert equal_states(compact, full)
    for each in (compact, full):
        fxprune.prune.channels(each, 0.5, compact_masks=each is compact, round_to=1)  # chosen anew
        fxprune.prune.l1_unstructured(each, "9.weight", 0.2)
        fxprune.prune.remove(each, "7.weight")
    assert equal_states(compact, full)
    assert compact.get_buffer("9.weight_mask").stride() == full.get_buffer("9.weight_mask").stride()
    assert torch.equal(compact.eval()(X), full.eval()(X))
    assert equal_states(fxprune.finalize(compact), fxprune.finalize(full))


def test_a_schedule_steps_alike() -> None:
    found = []
    for is_compact in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        traced = fxprune.trace(model, torch.randn(2, 6))
        schedule = fxprune.Schedule(
            traced,
            None,
            lambda gone, traced=traced, is_compact=is_compact: fxprune.prune.channels(  # type: ignore[misc]
                traced, macs=1 - gone, compact_masks=is_compact
            ),
            0.5,
            stop=2,
        )
        while not schedule.done:
            schedule.step()
        found.append(traced)
    assert vectors(found[0])
    assert equal_states(*found)


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_under_ddp_they_have_all_entries() -> None:
    compact, full = pair()
    spread = DistributedDataParallel(compact.train())
    assert not vectors(compact)
    spread(X).sum().backward()
    want = full.train()
    want(X).sum().backward()
    assert equal_states(compact, full)
    for one, other in zip(compact.parameters(), want.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


@pytest.mark.usefixtures("group")
def test_a_module_that_is_spread_over_processes_is_refused() -> None:
    traced = fxprune.trace(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 3))
    fully_shard(traced, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ShardingError, match="compact_masks=True"):
        fxprune.prune.channels(traced, 0.5, compact_masks=True)
    assert not fxprune.prune.is_pruned(traced)


def test_another_value_is_refused() -> None:
    traced = fxprune.trace(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 3))
    with pytest.raises(ArgumentTypeError, match="compact_masks=1"):
        fxprune.prune.channels(traced, 0.5, compact_masks=1)
    assert not fxprune.prune.is_pruned(traced)
