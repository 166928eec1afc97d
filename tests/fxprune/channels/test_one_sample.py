"""Multiply-accumulates are those of one sample, whatever batch was traced, by both ways of counting and in files."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fxprune
from fxprune.channels.groups import Grouping, table
from fxprune.errors import BatchSpecializedWarning
from fxprune.graph.batch import Batch
from fxprune.graph.plan import ChannelPlan


class Mixed(nn.Module):
    """Convolutions, attention, a recurrent layer, and a product of two parameters, which is needed once a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.lstm = nn.LSTM(16, 8, batch_first=True)
        self.left, self.right = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.depthwise(self.conv(x).relu()).flatten(2).transpose(1, 2)
        tokens = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        hidden = self.lstm(tokens)[0].mean(1) @ (self.left @ self.right)
        return self.head(hidden.relu())


class FixedBatch(Mixed):
    """A number in place of the batch."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(self.batch, 3, 6, 6))


CONVOLUTIONS = 36 * 16 * 27 + 16 * 16 * 9
ATTENTION = 16 * 16 * (48 + 16) + 2 * 16 * 16 * 16
RECURRENT = 16 * 4 * 8 * (16 + 8)
PARAMETERS = 8 * 6 * 8
MACS = CONVOLUTIONS + ATTENTION + RECURRENT + PARAMETERS + 8 * 8 + 8 * 4


@pytest.mark.parametrize(
    ("batch", "free"),
    [
        (1, True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, False), (2, True), (8, True), (8, False))),
    ],
)
def test_plan_report_groups_and_files_count_one_sample_whatever_batch_was_traced(
    batch: int, free: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Mixed()
    x = torch.randn(batch, 3, 6, 6)
    shapes: dict[str, object] = {} if free else {"dynamic_shapes": None}
    traced = fxprune.trace(model, (x,), modes=("eval",), **shapes)  # type: ignore[arg-type]
    grouping = Grouping(traced)
    assert grouping.dense[0] == MACS
    assert grouping.sample == "one sample of 3x6x6"
    report = fxprune.prune.channels(traced, macs=MACS - 5000, round_to=1)
    final = fxprune.finalize(traced, align=1)
    assert final.plan is not None
    assert final.plan.macs == report.macs
    assert report.macs[0] == MACS
    assert 0 < report.macs[1] <= MACS - 5000
    assert report.sample == final.plan.sample == "one sample of 3x6x6"
    assert "MACs for one sample of 3x6x6\n" in final.plan.explain()
    assert "MACs for one sample of 3x6x6\n" in table(grouping.groups)
    fxprune.export.to_program(final, tmp_path / "model.pt2")
    contents = fxprune.export.inspect(tmp_path / "model.pt2")
    assert (contents.macs, contents.sample) == (report.macs[1], "one sample of 3x6x6")


def test_a_batch_that_is_written_in_the_graph_is_divided_by() -> None:
    found = []
    for batch in (1, 8):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BatchSpecializedWarning)
            traced = fxprune.trace(FixedBatch(batch), (torch.randn(batch, 3, 6, 6),), modes=("eval",))
        assert Batch.of(traced.graphs["eval"]).size == batch
        plan = fxprune.finalize(traced).plan
        assert plan is not None
        found.append((Grouping(traced).dense[0], plan.macs[0]))
    assert len({*found}) == 1


@pytest.mark.parametrize(("batch", "fixed"), [(1, True), (8, False)])
def test_an_onnx_file_counts_one_sample_whatever_batch_was_traced(batch: int, fixed: bool, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
    final = fxprune.finalize(fxprune.trace(model, (torch.randn(batch, 3, 6, 6),), modes=("eval",)))
    fxprune.export.to_onnx(final, tmp_path / "model.onnx", dynamic_shapes=None if fixed else "captured")
    contents = fxprune.export.inspect(tmp_path / "model.onnx")
    assert contents.macs == 8 * 16 * 27 + 1280
    assert contents.sample == "one sample of 3x6x6"


def test_a_dynamic_length_is_counted_as_the_sample_has_it_and_named(tmp_path: Path) -> None:
    shapes = ({0: Dim("batch"), 1: Dim("time")},)
    traced = fxprune.trace(nn.Linear(3, 4), (torch.randn(2, 5, 3),), dynamic_shapes=shapes)
    final = fxprune.finalize(traced)
    assert final.plan is not None
    assert (final.plan.macs, final.plan.sample) == ((60, 60), "one sample of 5x3, axis 1 of input at 5")
    fxprune.export.to_onnx(final, tmp_path / "model.onnx")
    fxprune.export.to_program(final, tmp_path / "model.pt2")
    for name in ("model.onnx", "model.pt2"):
        contents = fxprune.export.inspect(tmp_path / name)
        assert (contents.macs, contents.sample) == (60, "one sample of 5x3, axis 1 of input at 5")


class Two(nn.Module):
    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.product = nn.Linear(4, 6), product

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.product(self.layer(x), y)


@pytest.mark.parametrize("batch", [2, 5])
def test_what_is_quadratic_in_a_free_batch_is_that_of_one_sample(batch: int) -> None:
    traced = fxprune.trace(Two(lambda x, y: x @ y.mT), (torch.randn(batch, 4), torch.randn(batch, 6)))
    final = fxprune.finalize(traced)
    assert final.plan is not None
    assert final.plan.macs[0] == Grouping(traced).dense[0] == 24 + 6
    assert final.plan.sample == "one sample of x 4, y 6"


def test_inputs_that_share_no_axis_are_counted_whole() -> None:
    traced = fxprune.trace(
        Two(lambda x, y: x @ y), (torch.randn(3, 4), torch.randn(6, 2)), dynamic_shapes=None, modes=("eval",)
    )
    final = fxprune.finalize(traced)
    assert final.plan is not None
    assert final.plan.macs[0] == Grouping(traced).dense[0] == 3 * 24 + 36
    assert final.plan.sample == "inputs of x 3x4, y 6x2"


def test_a_plan_of_earlier_versions_says_no_sizes() -> None:
    traced = fxprune.trace(nn.Linear(3, 4), (torch.randn(2, 3),))
    plan = fxprune.finalize(traced).plan
    assert plan is not None
    text = plan.to_json()
    assert ChannelPlan.from_json(text).sample == "one sample of 3"
    old = text.replace(', "sample": "one sample of 3"', "")
    assert old != text
    assert ChannelPlan.from_json(old).sample == ""
    assert "MACs for" not in ChannelPlan.from_json(old).explain()
