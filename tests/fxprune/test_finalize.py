"""`finalize` from end to end: removal, alignment, plans, batch norm, training on, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.channels import ChannelPlan
from fxprune.errors import ArgumentError, ArgumentTypeError, ArtifactError, FinalizeError
from tests.networks import Residual, mlp

# rows are masked before batch norms whose statistics are alive
pytestmark = pytest.mark.filterwarnings("ignore::fxprune.errors.EvalConstantWarning")


def _trained(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.double()


@pytest.fixture(scope="module")
def captured() -> fxprune.TracedModule:
    torch.manual_seed(0)
    return fxprune.trace(_trained(Residual()).eval(), (torch.randn(2, 3, 6, 6).double(),))


@pytest.fixture
def traced(captured: fxprune.TracedModule) -> fxprune.TracedModule:
    """Half of the rows of every weight masked, biases and batch norms alive."""
    traced = copy.deepcopy(captured)
    for name in ("stem.weight", "inner.weight"):
        fxprune.prune.random_structured(traced, name, amount=0.5, dim=0)
    return traced


def _close(left: torch.Tensor, right: torch.Tensor) -> bool:
    return bool((left - right).abs().max() <= 1e-9 * left.abs().max())


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_dead_rows_go_and_the_outputs_stay(traced: fxprune.TracedModule, batch: int) -> None:
    final = fxprune.finalize(traced, align=1)
    x = torch.randn(batch, 3, 6, 6).double()
    assert _close(traced(x), final(x))
    assert sum(p.numel() for p in final.parameters()) < sum(p.numel() for p in traced.parameters())
    assert final.plan.macs[1] < final.plan.macs[0]
    kept = final.plan.kept["stem.weight"][0]
    assert kept.dtype is torch.int64
    assert len(kept) == final.get_submodule("stem").weight.shape[0] < 8
    assert "stem.weight" in final.plan.explain()


def test_the_train_graph_shrinks_with_it_and_trains_on(traced: fxprune.TracedModule) -> None:
    final = fxprune.finalize(traced, align=1).train()
    optimizer = torch.optim.SGD(final.parameters(), 0.01, momentum=0.9)
    before = final.get_submodule("norm").running_mean.clone()
    for _ in range(2):
        optimizer.zero_grad()
        final(torch.randn(4, 3, 6, 6).double()).square().mean().backward()
        optimizer.step()
    assert not torch.equal(before, final.get_submodule("norm").running_mean)
    again = fxprune.trace(final, (torch.randn(2, 3, 6, 6).double(),))
    x = torch.randn(3, 3, 6, 6).double()
    assert torch.equal(again.eval()(x), final.eval()(x))


def test_without_shrink_shapes_stay_and_outputs_are_the_same_bits(traced: fxprune.TracedModule) -> None:
    final = fxprune.finalize(traced, shrink=False)
    x = torch.randn(3, 3, 6, 6).double()
    assert torch.equal(traced(x), final(x))
    assert final.plan is None
    assert final.get_submodule("stem").weight.shape == (8, 3, 3, 3)


class _Behind(nn.Module):
    """A layer that reads what a recurrent one returns, batch first: that does not lie in the order of its axes."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.recurrent = kind(4, 8, batch_first=True)
        self.layer = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(self.recurrent(x)[0].relu())
        return out


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("grad", [True, False])
def test_layers_behind_recurrent_ones_compute_the_same_bits_with_weights_that_are_computed_no_more(
    kind: type[nn.RNNBase], grad: bool
) -> None:
    torch.manual_seed(0)
    traced = fxprune.trace(_Behind(kind).eval(), (torch.randn(2, 7, 4),), modes=("eval",))
    fxprune.prune.l1_unstructured(traced, "layer.weight", amount=0.4)
    final = fxprune.finalize(traced)
    x = torch.randn(5, 7, 4)
    with torch.set_grad_enabled(grad):
        assert torch.equal(traced(x), final(x))


def test_weights_and_what_an_optimizer_holds_of_them_stay_by_channels_last() -> None:
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8)
    traced = fxprune.trace(model, x)
    fxprune.prune.channels(traced, amount=0.5, round_to=1)
    optimizer = torch.optim.SGD(traced.parameters(), lr=0.1, momentum=0.9)
    traced(x).sum().backward()
    optimizer.step()
    final = fxprune.finalize(traced, align=1)
    after = fxprune.optimizer_after(final, optimizer)
    for name in ("0.weight", "2.weight"):
        weight = final.get_parameter(name)
        assert weight.shape[0] < 8
        for tensor in (weight, after.state[weight]["momentum_buffer"]):
            assert tensor.is_contiguous(memory_format=torch.channels_last)
            assert not tensor.is_contiguous()


@pytest.mark.parametrize("align", [2, 4, 8, "auto"])
def test_alignment_keeps_multiples(traced: fxprune.TracedModule, align: Any) -> None:
    final = fxprune.finalize(traced, align=align)
    multiple = 4 if align == "auto" else align
    for name in ("stem", "inner"):
        assert final.get_submodule(name).weight.shape[0] % multiple == 0
    x = torch.randn(3, 3, 6, 6).double()
    assert _close(traced(x), final(x))


def test_a_stored_plan_gives_a_dense_model_the_same_architecture(
    traced: fxprune.TracedModule, captured: fxprune.TracedModule
) -> None:
    final = fxprune.finalize(traced, align=1)
    plan = ChannelPlan.from_json(final.plan.to_json())
    other = fxprune.finalize(captured, plan=plan)
    shapes = {k: v.shape for k, v in final.state_dict().items()}
    assert {k: v.shape for k, v in other.state_dict().items() if k in shapes} == shapes
    other.load_state_dict(final.state_dict(), strict=False)


def test_a_plan_of_another_model_or_a_damaged_one_is_refused(traced: fxprune.TracedModule) -> None:
    plan = fxprune.finalize(traced).plan
    other = fxprune.trace(mlp(), (torch.randn(2, 6),))
    with pytest.raises(FinalizeError, match="another model"):
        fxprune.finalize(other, plan=plan)
    with pytest.raises(ArtifactError, match="not a channel plan"):
        ChannelPlan.from_json(plan.to_json()[:-40])


def test_batch_norm_folds_to_an_eval_model_that_is_equal_to_rounding(traced: fxprune.TracedModule) -> None:
    final = fxprune.finalize(traced, fold_batch_norm=True)
    x = torch.randn(3, 3, 6, 6).double()
    assert _close(traced(x), final(x))
    assert final.modes == ("eval",)
    assert not any("norm" in name for name in final.state_dict())


def test_a_nan_row_is_not_dead(traced: fxprune.TracedModule) -> None:
    with torch.no_grad():
        weight = traced.get_submodule("stem").weight_orig
        row = int((traced.get_submodule("stem").weight_mask.flatten(1).sum(1) == 0).nonzero()[0])
        weight[row, 0, 0, 0] = float("nan")
    with pytest.warns(fxprune.FxpruneWarning, match="stem.weight"):
        final = fxprune.finalize(traced, align=1)
    assert row in final.plan.kept["stem.weight"][0]


@pytest.mark.parametrize("align", [0, -1, "some", 1.5, True])
def test_an_unusable_alignment_is_refused(traced: fxprune.TracedModule, align: Any) -> None:
    with pytest.raises(ArgumentError, match="align="):
        fxprune.finalize(traced, align=align)


def test_what_is_not_traced_or_has_no_eval_graph_is_refused() -> None:
    with pytest.raises(ArgumentTypeError, match="trace first"):
        fxprune.finalize(mlp())  # type: ignore[arg-type]
    with pytest.raises(FinalizeError, match="eval graph"):
        fxprune.finalize(fxprune.trace(mlp(), (torch.randn(2, 6),), modes=("train",)))
