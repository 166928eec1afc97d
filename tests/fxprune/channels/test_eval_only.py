"""Channels that are constant in eval mode alone: named, warned of, and kept on request."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import EvalConstantWarning, FxpruneWarning
from fxprune.graph.plan import ChannelPlan


def _network(mean: float, shift: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    nn.init.constant_(model[1].bias, shift)
    model[1].running_mean.fill_(mean)
    return model


X = torch.randn(5, 3, 6, 6)


def _masked(model: nn.Module, row: int = 2, name: str = "0") -> fxprune.TracedModule:
    """One row and its bias masked."""
    traced = fxprune.trace(model, (X,))
    for tensor in ("weight", "bias"):
        mask = torch.ones_like(traced.get_parameter(f"{name}.{tensor}"))
        mask[row] = 0
        fxprune.prune.custom_from_mask(traced, f"{name}.{tensor}", mask)
    return traced


def _differ(first: nn.Module, second: nn.Module, mode: bool) -> float:
    return float((first.train(mode)(X) - second.train(mode)(X)).detach().abs().max())


@pytest.mark.parametrize("mean", [3.0, -3.0])
def test_what_is_constant_in_eval_mode_alone_is_named_and_warned_of(mean: float) -> None:
    traced = _masked(_network(mean))
    with pytest.warns(EvalConstantWarning, match="1 of 1.*keep_for_training=True") as caught:
        final = fxprune.finalize(traced, align=1)
    assert len(caught) == 1
    assert final.get_parameter("0.weight").shape[0] == 3
    assert final.plan is not None
    assert final.plan.eval_only == {"1": [2]}
    assert "1: 1 (2) constant in eval mode alone" in final.plan.explain()
    assert ChannelPlan.from_json(final.plan.to_json()).eval_only == {"1": [2]}
    assert _differ(traced, final, mode=False) < 1e-5
    assert _differ(traced, final, mode=True) > 0.01


@pytest.mark.parametrize("mean", [3.0, -3.0])
def test_on_request_it_stays_and_train_mode_computes_the_same(mean: float) -> None:
    traced = _masked(_network(mean))
    final = fxprune.finalize(traced, align=1, keep_for_training=True)
    assert final.get_parameter("0.weight").shape[0] == 4
    assert final.plan is not None
    assert final.plan.eval_only == {}
    assert "constant in eval mode alone, and kept for training" in final.plan.explain()
    assert _differ(traced, final, mode=False) < 1e-5
    assert _differ(traced, final, mode=True) < 1e-5


@pytest.mark.parametrize("mean", [3.0, -3.0])
def test_an_optimizer_that_goes_on_warns_whatever_the_constant_is(mean: float) -> None:
    traced = _masked(_network(mean)).train()
    optimizer = torch.optim.SGD(traced.parameters(), 0.1)
    with pytest.warns(EvalConstantWarning):
        final = fxprune.finalize(traced, align=1)
    with pytest.warns(FxpruneWarning, match="1: constant in eval mode alone"):
        fxprune.optimizer_after(final.train(), optimizer)
    kept = fxprune.finalize(traced, align=1, keep_for_training=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fxprune.optimizer_after(kept.train(), optimizer)
    assert not any("eval mode alone" in str(warning.message) for warning in caught)


@pytest.mark.parametrize(
    ("mean", "shift"),
    [(0.0, 1.0), (3.0, -1.0), (1e-8, 1.0)],
    ids=["the mean is that of the row", "zero behind ReLU in both modes", "but for rounding"],
)
def test_what_is_the_same_constant_in_both_modes_is_not_named(mean: float, shift: float) -> None:
    traced = _masked(_network(mean, shift))
    final = fxprune.finalize(traced, align=1)
    assert final.plan is not None
    assert final.plan.eval_only == {}
    assert final.get_parameter("0.weight").shape[0] == 3
    assert _differ(traced, final, mode=True) < 1e-5


def test_masks_on_whole_groups_leave_nothing_to_warn_of() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Dropout2d(0.5), nn.Conv2d(32, 2, 3))
    model[1].running_mean.uniform_(1, 2)
    nn.init.uniform_(model[1].bias, 0, 1)
    traced = fxprune.trace(model, (X,))
    fxprune.prune.channels(traced, macs=0.5)
    final = fxprune.finalize(traced)
    assert final.plan is not None
    assert final.plan.eval_only == {}


def test_without_a_train_graph_the_plan_names_nothing() -> None:
    model = _network(3.0)
    traced = fxprune.trace(model, (X,), modes=("eval",))
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0, 0
    final = fxprune.finalize(traced, align=1)
    assert final.plan is not None
    assert final.plan.eval_only == {}
    assert final.get_parameter("0.weight").shape[0] == 3


def test_a_frozen_batch_norm_is_the_same_in_both_modes() -> None:
    traced = fxprune.freeze_batch_norms(_masked(_network(3.0)))
    final = fxprune.finalize(traced, align=1)
    assert final.plan is not None
    assert final.plan.eval_only == {}
    assert final.get_parameter("0.weight").shape[0] == 3
    assert _differ(traced, final, mode=True) < 1e-5


class Flattened(nn.Module):
    """A chain of two norms, read flattened, behind a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _network(3.0)
        self.norm, self.drop, self.head = nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Linear(32, 3)
        self.norm.running_mean.fill_(2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.net(x)).sigmoid().flatten(1)))


def test_norms_before_a_flattened_read_are_named() -> None:
    traced = _masked(Flattened(), row=1, name="net.3")
    with pytest.warns(EvalConstantWarning):
        final = fxprune.finalize(traced, align=1)
    assert final.plan is not None
    assert final.plan.eval_only == {"norm": [1]}
    kept = fxprune.finalize(traced, align=1, keep_for_training=True)
    traced.get_submodule("drop").eval()
    kept.get_submodule("drop").eval()
    assert _differ(traced, kept, mode=True) < 1e-5


class Branch(nn.Module):
    """A branch whose norm is all that is left of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.bias.zero_()
        self.norm.running_mean.fill_(2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.norm(self.conv(x)).sigmoid())


def test_a_branch_that_is_constant_in_eval_mode_alone() -> None:
    traced = fxprune.trace(Branch(), (X,))
    with pytest.warns(EvalConstantWarning, match="3 of norm"):
        final = fxprune.finalize(traced, align=1)
    assert "conv.weight" not in final.state_dict()
    kept = fxprune.finalize(traced, align=1, keep_for_training=True)
    assert "conv.weight" in kept.state_dict()
    assert _differ(traced, kept, mode=True) < 1e-5
    assert _differ(traced, kept, mode=False) < 1e-5
