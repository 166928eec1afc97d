"""What each step holds at its peak beside the module, as a multiple of the parameters' bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fxprune
from fxprune.graph import working_memory
from fxprune.graph.expanded import is_expanded
from tests.tensor_memory import TensorMemory, let_go_of_what_is_free, private_bytes


class _Blocks(nn.Module):
    """Residual blocks of two layers, weights far larger than activations, and more than one of them."""

    def __init__(self, width: int = 64, hidden: int = 256, count: int = 6) -> None:
        super().__init__()
        self.rise = nn.ModuleList(nn.Linear(width, hidden, bias=False) for _ in range(count))
        self.fall = nn.ModuleList(nn.Linear(hidden, width, bias=False) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for rise, fall in zip(self.rise, self.fall, strict=True):
            x = x + fall(rise(x).relu())
        return x


@pytest.fixture
def traced() -> fxprune.TracedModule:
    torch.manual_seed(0)
    return fxprune.trace(_Blocks(), (torch.randn(2, 64),), modes=("eval",))


def _peak(traced: fxprune.TracedModule, call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call gives, and its peak over the bytes of the parameters."""
    memory = TensorMemory([*traced.parameters(), *traced.buffers()])
    with memory:
        result = call()
    return result, memory.peak / sum(parameter.nbytes for parameter in traced.parameters())


def test_the_count_sees_what_is_alive_at_once_and_no_more() -> None:
    there = torch.ones(100)
    with TensorMemory([there]) as memory:
        first = there + 1
        second = first * 2
        del first, second
        third = there.view(10, 10) + 1
    assert memory.peak == 800
    assert memory.alive == third.nbytes == 400


@pytest.mark.parametrize(("compact", "most"), [(False, 1.1), (None, 0.2)])  # as full masks, as where nothing is trained
def test_channels_hold_masks_and_no_masked_weights(
    traced: fxprune.TracedModule, compact: bool | None, most: float
) -> None:
    _, peak = _peak(traced, lambda: fxprune.prune.channels(traced, macs=0.7, compact_masks=compact))
    assert fxprune.finalize(traced).plan.macs[1] <= 0.7 * fxprune.finalize(traced).plan.macs[0]
    assert peak < most  # all is masked: masks, and of other things one of twelve at a time


def test_channels_of_narrow_types_hold_no_whole_weight_in_a_wider_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working_memory, "BYTES_AT_ONCE", 2**10)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(2048, 64), nn.Linear(64, 256), nn.Linear(256, 64)).to(torch.bfloat16)
    narrow = fxprune.trace(model, (torch.randint(0, 2048, (2, 5)),), modes=("eval",))
    _, peak = _peak(narrow, lambda: fxprune.prune.channels(narrow, 0.3, compact_masks=True, ignore="2.weight"))
    largest = narrow.get_parameter("0.weight_orig").nbytes / sum(each.nbytes for each in narrow.parameters())
    assert peak < 1.25 * largest  # one masked weight; in float32 it would be twice that


@pytest.mark.parametrize(("compact", "most"), [(False, 1.2), (True, 0.3)])
def test_more_channels_hold_no_weights_under_the_masks_of_before(
    traced: fxprune.TracedModule, compact: bool, most: float
) -> None:
    fxprune.prune.channels(traced, macs=0.8, compact_masks=compact)
    with torch.no_grad():  # so that the choice goes on from the masks
        traced.get_parameter("rise.0.weight_orig").mul_(1.01)
    _, peak = _peak(traced, lambda: fxprune.prune.channels(traced, macs=0.7, compact_masks=compact))
    assert peak < most  # masks, and one weight under its mask at a time


@pytest.mark.parametrize(("compact", "most"), [(False, 1.2), (True, 0.3)])
def test_channels_that_are_chosen_anew_hold_no_second_module(
    traced: fxprune.TracedModule, compact: bool, most: float
) -> None:
    fxprune.prune.channels(traced, macs=0.8, compact_masks=compact)
    _, peak = _peak(traced, lambda: fxprune.prune.channels(traced, macs=0.7, compact_masks=compact))
    assert peak < most  # as above
    assert all(is_expanded(mask) for mask in traced.buffers()) == compact


def test_a_trial_in_the_class_holds_what_is_written_back_and_no_copy_of_the_module(
    traced: fxprune.TracedModule,
) -> None:
    _, peak = _peak(traced, lambda: fxprune.prune.channels(traced, macs=0.7, runnable=_Blocks()))
    assert peak < 4.8  # what is left twice, 1.4, and the class's in float64, 2; and what is around these


def test_finalize_holds_its_weights_once(traced: fxprune.TracedModule) -> None:
    fxprune.prune.channels(traced, macs=0.7)
    final, peak = _peak(traced, lambda: fxprune.finalize(traced))
    assert peak < 1.05  # what is left, 0.7; a masked weight, and the same in float64 for the check of outputs
    x = torch.randn(3, 64)
    assert (final(x) - traced(x)).abs().max() < 1e-5
    kept = {tensor.untyped_storage().data_ptr() for tensor in (*final.parameters(), *final.buffers())}
    assert kept.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in (*traced.parameters(), *traced.buffers()))


def test_the_check_of_outputs_widens_one_weight_at_a_time(traced: fxprune.TracedModule) -> None:
    fxprune.prune.ln_structured(traced, "rise.0.weight", amount=0.5, n=2, dim=0)
    final, peak = _peak(traced, lambda: fxprune.finalize(traced))
    assert final.plan.removed["rise.0.weight"] == {0: 128}
    assert peak < 1.4  # what is left, and a weight in float64


def test_weights_that_are_mapped_stay_in_their_file_while_channels_are_planned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = _Blocks(width=384, hidden=1536, count=8), torch.randn(2, 384)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    traced = fxprune.trace(model, (x,), modes=("eval",))
    expected = fxprune.prune.channels(traced, macs=0.7).removed
    let_go_of_what_is_free()
    before = private_bytes()
    with torch.device("meta"):
        mapped = _Blocks(width=384, hidden=1536, count=8)
    mapped.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    planned = fxprune.trace(mapped, (x,), modes=("eval",))
    groups = fxprune.channel_groups(planned)
    let_go_of_what_is_free()
    held = (private_bytes() - before) / weights
    assert len(groups) == len(fxprune.channel_groups(traced)) > 8
    assert held < 0.3
    assert fxprune.prune.channels(planned, macs=0.7).removed == expected
    assert torch.equal(fxprune.finalize(planned)(x), fxprune.finalize(traced)(x))


def test_finalize_without_shrinking_holds_a_copy(traced: fxprune.TracedModule) -> None:
    fxprune.prune.l1_unstructured(traced, "rise.0.weight", amount=0.5)
    final, peak = _peak(traced, lambda: fxprune.finalize(traced, shrink=False))
    assert peak < 1.3
    assert torch.equal(final.get_parameter("fall.0.weight"), traced.get_parameter("fall.0.weight"))
    assert final.get_parameter("fall.0.weight") is not traced.get_parameter("fall.0.weight")


def test_a_comparison_of_convolutions_with_biases_widens_one_weight_at_a_time() -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Conv2d(48, 48, 3, padding=1), nn.ReLU())]
    model, x = nn.Sequential(*layers).eval(), torch.randn(1, 48, 4, 4)
    captured = fxprune.trace(model, (x,), modes=("eval",))
    memory = TensorMemory(captured.parameters())
    with memory:
        report = fxprune.compare(model, captured, inputs=x)
    assert report.ok
    assert memory.peak < 0.8 * sum(parameter.nbytes for parameter in captured.parameters())  # two in float64: 0.67


def test_the_truth_in_float64_holds_one_weight_at_a_time(traced: fxprune.TracedModule) -> None:
    report, peak = _peak(traced, lambda: fxprune.compare(traced, _again(traced), inputs=torch.randn(2, 64)))
    assert [row.error is not None for row in report.rows] == [True]
    assert peak < 0.3


def test_where_operators_take_one_type_the_truth_is_a_copy() -> None:
    traced = fxprune.trace(nn.LSTM(8, 16, batch_first=True), (torch.randn(2, 5, 8),))
    x = torch.randn(2, 5, 8)
    report = fxprune.compare(traced, _again(traced), inputs=x)
    exact = copy.deepcopy(traced).eval()
    lstm = nn.LSTM(8, 16, batch_first=True).double()
    lstm.load_state_dict(exact.state_dict())
    with torch.no_grad():
        error = (traced.eval()(x)[0] - lstm(x.double())[0]).abs().max() / lstm(x.double())[0].abs().max()
    assert report.rows[0].error == pytest.approx(error.item(), rel=1e-3)


def _again(traced: fxprune.TracedModule) -> fxprune.TracedModule:
    """Another module with the same tensors."""
    return copy.deepcopy(traced, {id(tensor): tensor for tensor in (*traced.parameters(), *traced.buffers())})
