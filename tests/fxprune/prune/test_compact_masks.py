"""Masks of one axis that hold a vector: they act as those that hold all entries do, wherever they are read."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fxprune
from fxprune.errors import ArgumentError, ArgumentTypeError, ShardingError
from fxprune.graph.expanded import is_expanded
from fxprune.sharding import is_sharded


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


class Stream(nn.Module):
    """A residual stream that loses channels, so that its convolutions lose rows and columns."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.up = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1, bias=False)
        self.down, self.rise = nn.Conv2d(24, 16, 3, padding=1, groups=2), nn.ConvTranspose2d(16, 12, 2, groups=2)
        self.leave = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        x = x + self.down(self.up(x).relu())
        return self.leave(self.rise(x).relu().mean((2, 3)))


def test_masks_of_rows_and_columns_hold_one_value_a_kernel() -> None:
    torch.manual_seed(0)
    model = Stream().eval()
    compact, full = (fxprune.trace(copy.deepcopy(model), X, modes=("eval",)) for _ in range(2))
    for traced, is_compact in ((compact, True), (full, False)):
        fxprune.prune.channels(traced, 0.5, compact_masks=is_compact, round_to=1)
    kernels = {"up": 24 * 16, "down": 16 * 12, "rise": 16 * 6}
    for name, count in kernels.items():
        mask = compact.get_buffer(f"{name}.weight_mask")
        assert mask.untyped_storage().nbytes() == 4 * count
        assert not mask.any(0).any(-1).any(-1).all() or not mask.any(1).any(-1).any(-1).all()
    assert equal_states(compact, full)
    assert torch.equal(compact(X), full(X))
    assert equal_states(*(fxprune.finalize(each, align=1) for each in (compact, full)))


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
    with torch.no_grad():
        compact.get_buffer("9.weight_mask")[0, 0] += 1
    with pytest.raises(ArgumentError, match="was written into"):
        DistributedDataParallel(compact.train())
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
def test_a_module_that_is_spread_over_processes_has_parts_of_full_ones() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    traced = fxprune.trace(model, torch.randn(2, 3), modes=("eval",))
    fully_shard(traced, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ShardingError, match="compact_masks=True"):
        fxprune.prune.channels(traced, 0.5, compact_masks=True)
    assert not fxprune.prune.is_pruned(traced)
    fxprune.prune.channels(traced, 0.5)
    masks = [buffer for name, buffer in traced.named_buffers() if name.endswith("_mask")]
    assert len(masks) == 3
    assert all(is_sharded(mask) and 0 not in mask.to_local().stride() for mask in masks)  # type: ignore[operator]


def deployed(**options: Any) -> fxprune.TracedModule:
    """A network traced for eval mode alone, of which one mask is of columns."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    traced = fxprune.trace(model, torch.randn(2, 4), modes=("eval",))
    fxprune.prune.channels(traced, 0.5, round_to=1, targets="2.weight", **options)
    return traced


COLUMNS = "4.weight_mask"  # [3, 6], one row in memory
ROW = torch.linspace(-1, 1, 12).reshape(3, 4)


def write(traced: nn.Module) -> None:
    """Zero one entry; so all of its column becomes zero."""
    mask = traced.get_buffer(COLUMNS)
    mask[1, int(mask[0].argmax())] = 0


def test_they_are_the_default_where_nothing_is_trained() -> None:
    assert vectors(deployed()) == ["2.weight_mask", COLUMNS]
    assert vectors(deployed(compact_masks=True)) == ["2.weight_mask", COLUMNS]
    assert not vectors(deployed(compact_masks=False))
    assert equal_states(deployed(), deployed(compact_masks=False))
    _, trained = pair()
    fxprune.prune.channels(trained, 0.5, round_to=1)
    assert not vectors(trained)


def _exported(kind: str) -> Callable[[fxprune.TracedModule, Path], object]:
    return lambda traced, folder: getattr(fxprune.export, f"to_{kind}")(traced, folder / f"masked.{ENDINGS[kind]}")


@pytest.fixture(scope="module")
def again() -> fxprune.TracedModule:
    """Written into, and taken back, by one test after the other."""
    return deployed()


@pytest.fixture(scope="module")
def wanted() -> fxprune.TracedModule:
    return deployed(compact_masks=False)


ENDINGS = {"onnx": "onnx", "program": "pt2", "torchscript": "pt"}
CALLS: dict[str, Callable[[fxprune.TracedModule, Path], object]] = {
    "forward": lambda traced, _: traced(ROW),
    "forward within another module": lambda traced, _: nn.Sequential(traced)(ROW),
    "run_example": lambda traced, _: traced.run_example(),
    "finalize": lambda traced, _: fxprune.finalize(traced),
    "compare": lambda traced, _: fxprune.compare(traced, nn.Linear(4, 3), inputs=ROW),
    "compare, within another module": lambda traced, _: fxprune.compare(nn.Sequential(traced), traced, inputs=ROW),
    "compare, as a candidate": lambda traced, _: fxprune.compare(nn.Linear(4, 3), traced, inputs=ROW),
    "save": lambda traced, folder: fxprune.save(traced, folder / "masked.fxp"),
    "deepcopy": lambda traced, _: copy.deepcopy(traced),
    "channels": lambda traced, _: fxprune.prune.channels(traced, 0.75, round_to=1),
    "l1_unstructured": lambda traced, _: fxprune.prune.l1_unstructured(traced, "0.weight", 0.5),
    "remove": lambda traced, _: fxprune.prune.remove(traced, "2.weight"),
    "weight_norm": lambda traced, _: fxprune.weight_norm(traced, "0.weight"),
    "channel_groups": lambda traced, _: fxprune.channel_groups(traced),
    "sensitivity": lambda traced, _: fxprune.sensitivity(traced, [ROW]),
    "reconstruct": lambda traced, _: fxprune.reconstruct(traced, [ROW]),
    "write_back": lambda traced, _: fxprune.write_back(traced, nn.Linear(4, 3)),
    **{f"to_{kind}": _exported(kind) for kind in ENDINGS},
}


@pytest.mark.parametrize("name", CALLS)
def test_a_write_into_one_is_taken_back_and_told_by_the_next_call(
    name: str, again: fxprune.TracedModule, wanted: fxprune.TracedModule, tmp_path: Path
) -> None:
    write(again)
    with pytest.raises(ArgumentError, match=r"4.weight_mask'.* 6 values, .*\[3, 6\].* 1 of them .*compact_masks=False"):
        CALLS[name](again, tmp_path)
    assert equal_states(again, wanted)
    assert torch.equal(again(ROW), wanted(ROW))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["data", "state dict", "inference", "no change"])
def test_a_write_is_noticed_whichever_way_it_came(
    kind: str, again: fxprune.TracedModule, wanted: fxprune.TracedModule
) -> None:
    own = again.get_buffer(COLUMNS)
    mask = {"data": own.data, "state dict": again.state_dict()[COLUMNS]}.get(kind, own)
    with torch.inference_mode(kind == "inference"):
        mask[2, 0] = mask[2, 0] if kind == "no change" else 1 - mask[2, 0]
    if kind != "no change":
        with pytest.raises(ArgumentError, match="was written into"):
            fxprune.prune.is_pruned(again)
    assert fxprune.prune.is_pruned(again)
    assert equal_states(again, wanted)


def _moved(traced: fxprune.TracedModule) -> fxprune.TracedModule:
    with torch.inference_mode():
        return copy.deepcopy(traced).to(torch.bfloat16).to(torch.float32)


def _assigned(traced: fxprune.TracedModule) -> fxprune.TracedModule:
    result = deployed()
    result.load_state_dict(traced.state_dict(), assign=True)
    return result


def _stored(traced: fxprune.TracedModule) -> fxprune.TracedModule:
    file = io.BytesIO()
    torch.save(traced.state_dict(keep_vars=True), file)
    file.seek(0)
    result = deployed()
    result.load_state_dict(torch.load(file, weights_only=True), assign=True)
    return result


def _emptied(traced: fxprune.TracedModule) -> fxprune.TracedModule:
    state = copy.deepcopy(traced.state_dict())
    traced.to_empty(device="cpu").load_state_dict(state)
    return traced


COPIES: dict[str, Callable[[fxprune.TracedModule], fxprune.TracedModule]] = {
    "deepcopy": copy.deepcopy,
    "deepcopy of a deepcopy": lambda traced: copy.deepcopy(copy.deepcopy(traced)),
    "dtype": lambda traced: traced.to(torch.float64).float(),
    "device": lambda traced: traced.to("cpu"),
    "share_memory": lambda traced: traced.share_memory(),
    "in inference mode": _moved,
    "assign": _assigned,
    "torch.save": _stored,
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_and_conversions_are_no_writes_and_those_into_them_are_noticed(name: str) -> None:
    source = deployed()
    kind = torch.bfloat16 if name == "in inference mode" else torch.float32
    wanted = copy.deepcopy(source).to(kind).to(torch.float32)
    traced = COPIES[name](source)
    assert vectors(traced) == ["2.weight_mask", COLUMNS]
    for _ in range(2):
        assert torch.equal(traced(ROW), wanted(ROW))
    assert equal_states(fxprune.finalize(traced), fxprune.finalize(wanted))
    with torch.inference_mode():
        write(traced)
    with pytest.raises(ArgumentError, match="was written into"):
        fxprune.finalize(traced)
    assert equal_states(traced, wanted)


@pytest.mark.usefixtures("group")
def test_masks_from_before_fully_shard_are_spread_with_their_weights() -> None:
    traced, wanted = deployed(), deployed(compact_masks=False)
    fully_shard(traced, mesh=init_device_mesh("cpu", (1,)))
    assert torch.equal(traced(ROW), wanted(ROW))
    write(traced)
    with pytest.raises(ArgumentError, match="was written into"):
        fxprune.finalize(traced)
    assert (
        fxprune.finalize(traced).plan.kept["4.weight"][1].tolist()
        == wanted.get_buffer(COLUMNS)[0].nonzero().flatten().tolist()
    )
    assert is_sharded(traced.get_buffer(COLUMNS))
    assert torch.equal(traced(ROW), wanted(ROW))


def test_a_conversion_hides_no_write() -> None:
    traced = deployed()
    write(traced)
    traced.double()
    with pytest.raises(ArgumentError, match="was written into"):
        traced(ROW.double())
    assert equal_states(traced, deployed().double())


@pytest.mark.parametrize("name", ["load_state_dict", "to_empty", "functional_call", "data of all entries"])
def test_masks_that_are_replaced_are_not_written_into(name: str) -> None:
    traced, wanted = deployed(), deployed()
    state = copy.deepcopy(traced.state_dict())
    if name == "functional_call":
        state[COLUMNS] = torch.zeros(3, 6)
        wanted.load_state_dict(state)
        assert torch.equal(torch.func.functional_call(traced, state, (ROW,)), wanted(ROW))
        assert vectors(traced)
        return
    if name == "load_state_dict":
        write(traced)  # which the state replaces
        traced.load_state_dict(state)
    elif name == "to_empty":
        traced = _emptied(traced)
    else:
        traced.get_buffer(COLUMNS).data = state[COLUMNS].contiguous()
        state[COLUMNS][1, 2] = 0
        traced.get_buffer(COLUMNS)[1, 2] = 0
        wanted.load_state_dict(state)
    assert torch.equal(traced(ROW), wanted(ROW))
    assert equal_states(fxprune.finalize(traced), fxprune.finalize(wanted))


def test_what_the_error_says_to_do_works() -> None:
    traced, full = deployed(), deployed(compact_masks=False)
    write(traced)
    with pytest.raises(ArgumentError, match="custom_from_mask"):
        traced(ROW)
    write(full)
    mask = full.get_buffer(COLUMNS)
    assert mask.sum() == deployed(compact_masks=False).get_buffer(COLUMNS).sum() - 1
    fxprune.prune.custom_from_mask(traced, "4.weight", mask)
    assert equal_states(traced, full)
    write(traced)
    write(full)
    assert torch.equal(traced(ROW), full(ROW))


def test_another_value_is_refused() -> None:
    traced = fxprune.trace(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 3))
    with pytest.raises(ArgumentTypeError, match="compact_masks=1"):
        fxprune.prune.channels(traced, 0.5, compact_masks=1)
    assert not fxprune.prune.is_pruned(traced)
