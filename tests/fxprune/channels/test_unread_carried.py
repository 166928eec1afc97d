"""What removal behind selections leaves is saved, loaded, exported, trained and written back like the rest."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from tests.fxprune.channels.exactness import EXACT, error
from tests.fxprune.channels.layers import Net, zero_rows
from tests.fxprune.channels.unread_networks import SELECTIONS, SHARED


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8).double()


def finalized(model: nn.Module, x: Tensor, modes: Any = ("train", "eval")) -> fxprune.TracedModule:
    return fxprune.finalize(fxprune.trace(model.double().eval(), (x,), modes=modes), align=1).eval()


@pytest.mark.parametrize(
    "name",
    ["every second", "both of every two, some of one unread", "chunk", "some of unbind", "all of unbind, dead",
     "single indices, unread"],
)  # fmt: skip
def test_selections_that_lost_channels_survive_files_training_and_export(name: str, tmp_path: Path) -> None:
    model, x = SELECTIONS[name].build(), images()
    final = finalized(model, x)
    fxprune.save(final, tmp_path / "a.fxp")
    for loaded in (fxprune.load(tmp_path / "a.fxp"), fxprune.load(tmp_path / "a.fxp", copy.deepcopy(model))):
        assert torch.equal(loaded.eval()(x), final(x))
        loaded.train()(x).sum().backward()
    final.float()
    fxprune.export.to_onnx(final, tmp_path / "a.onnx")  # compares the file


def test_an_uneven_selection_keeps_an_index_that_both_graphs_share() -> None:
    model = SELECTIONS["both of every two, some of one unread"].build()
    final = finalized(model, images())
    assert len([name for name, _ in final.named_buffers() if "index_of" in name]) == 1
    final.train()
    x = images()
    with torch.no_grad():
        assert error(model.train()(x), final(x)) < EXACT


SINGLE: dict[str, Any] = {
    "read by itself": lambda s, x: torch.stack([*x.unbind(1)[:7], x[:, 7].exp()], 1) + x.select(1, 1)[:, None],
    "written to": lambda s, x: written([x[:, i] for i in range(8)]),
    "stacked alone": lambda s, x: x + torch.stack([x[:, 1]], 1),
    "stacked, and computed with": lambda s, x: interleaved(*x.unbind(1)),
}


def written(parts: Any) -> Tensor:
    parts[1].add_(1)
    return torch.stack(parts, 1)


def interleaved(*parts: Tensor) -> Tensor:
    return torch.stack([*parts[:7], parts[7] + parts[1]], 1)


@pytest.mark.parametrize("name", SINGLE)
def test_a_single_channel_that_others_than_stacks_read_stays(name: str) -> None:
    model = Net(
        lambda s, x: s.second(SINGLE[name](s, F.relu(s.first(x)))), first=nn.Conv2d(3, 8, 1), second=nn.Conv2d(8, 4, 1)
    ).double()
    zero_rows(model.first, 1, bias=True)
    x = images()
    final = finalized(model, x)
    assert final.get_parameter("first.weight").shape[0] == 8
    assert final.plan is not None
    assert any("single index" in why or "only channel" in why for *_, why in final.plan.stayed)
    with torch.no_grad():
        assert error(model(x), final(x)) < EXACT


def test_a_slice_by_stride_that_is_written_to_keeps_its_channels() -> None:
    def written(s: Any, x: Tensor) -> Tensor:
        y = F.relu(s.first(x))
        y[:, ::2] += 1
        return s.second(y)

    model = Net(written, first=nn.Conv2d(3, 8, 1), second=nn.Conv2d(8, 4, 1)).double()
    zero_rows(model.first, 1, 2, 4, bias=True)
    x = images()
    final = finalized(model, x)
    with torch.no_grad():
        assert error(model(x), final(x)) < EXACT


@pytest.mark.parametrize("bias", [True, False])
def test_constants_of_the_calls_of_a_shared_layer_come_back_with_a_file(bias: bool, tmp_path: Path) -> None:
    def levels(s: Any, x: Tensor) -> Tensor:
        halves = F.relu(s.first(x)).split([4, 4], 1)
        return torch.cat([s.head(F.relu(n(s.shared(y)))) for n, y in zip(s.norms, halves, strict=True)], 1)

    model = Net(
        levels, first=nn.Conv2d(3, 8, 1), shared=nn.Conv2d(4, 4, 1, bias=bias), head=nn.Conv2d(4, 2, 1),
        norms=nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)]),
    )  # fmt: skip
    zero_rows(model.first, 1, 5)
    with torch.no_grad():
        model.first.bias[[1, 5]] = torch.tensor([1.0, 2.0])  # constants that differ between the halves
    x = images()
    final = finalized(model, x)
    assert final.plan is not None
    assert len(final.plan.added) > 1
    with torch.no_grad():
        assert error(model(x), final(x)) < EXACT
    fxprune.save(final, tmp_path / "a.fxp")
    for loaded in (fxprune.load(tmp_path / "a.fxp"), fxprune.load(tmp_path / "a.fxp", copy.deepcopy(model))):
        assert torch.equal(loaded.eval()(x), final(x))


def test_a_weight_that_is_read_by_its_own_transpose_has_a_group() -> None:
    model = Net(lambda s, x: F.relu(s.layer(x)) @ s.layer.weight, layer=nn.Linear(6, 12)).double()
    x = torch.randn(3, 6).double()
    traced = fxprune.trace(model, (x,))
    (group,) = [group for group in fxprune.channel_groups(traced) if group.reason is None]
    assert group.size == 12
    fxprune.prune.channels(traced, macs=0.5, round_to=1)
    final = fxprune.finalize(traced, align=1)
    assert final.get_parameter("layer.weight").shape == (6, 6)
    with torch.no_grad():
        assert error(traced.eval()(x), final.eval()(x)) < EXACT


@pytest.mark.parametrize("name", ["in groups", "depthwise", "one after the other"])
def test_layers_that_are_called_twice_have_groups(name: str) -> None:
    x = images()
    traced = fxprune.trace(SHARED[name].build().double(), (x,))
    fxprune.prune.channels(traced, amount=0.5, round_to=1)
    final = fxprune.finalize(traced, align=1)
    assert final.plan is not None
    assert len(final.plan.kept["first.weight"][0]) <= 8
    with torch.no_grad():
        assert error(traced.eval()(x), final.eval()(x)) < EXACT
