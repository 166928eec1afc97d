"""Whole residual blocks: found in the graph, masked where channels cannot keep a budget, gone in the class."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import ArgumentError, BudgetError, PruningError
from fxprune.prune.residual_blocks import residual_blocks, without

X = torch.randn(3, 6, 12)


class Numbers:
    """A configuration that says no width alone: `inner` is a multiple of the normalized one."""

    def __init__(self, layers: int = 4, ratio: int = 4) -> None:
        self.layers, self.ratio = layers, ratio

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Layer(nn.Module):
    def __init__(self, config: Numbers, index: int) -> None:
        super().__init__()
        self.index = index
        self.norm, self.gain = nn.LayerNorm(12), nn.Parameter(torch.ones(12))
        self.mix = nn.Conv1d(6, 6, 1)
        self.up, self.down = nn.Linear(12, 12 * config.ratio), nn.Linear(12 * config.ratio, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.norm(x)).tanh() * self.gain + x
        return x + nn.functional.dropout(self.down(self.up(x).relu()), 0.1, self.training)


class Model(nn.Module):
    config_class: ClassVar[type] = Numbers

    def __init__(self, config: Numbers) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def model_of(weights: list[float], **numbers: int) -> Model:
    """A model whose layers have weights of these sizes."""
    torch.manual_seed(0)
    model = Model(Numbers(len(weights), **numbers)).eval()
    for layer, size in zip(model.layers, weights, strict=True):
        for parameter in layer.parameters():
            parameter.data *= size
    return model


def test_channels_go_where_they_reach_the_budget() -> None:
    model = model_of([1, 0.1, 1])
    traced = fxprune.trace(model, (X,))
    report = fxprune.prune.channels(traced, macs=0.7, runnable=model)
    assert report.blocks == ()
    assert "whole blocks" not in str(report)


def test_the_least_blocks_go_where_channels_cannot_and_the_class_has_as_many_less() -> None:
    model = model_of([1, 0.1, 1, 0.2], ratio=1)
    traced = fxprune.trace(model, (X,))
    report = fxprune.prune.channels(traced, macs=0.6, runnable=model)
    assert report.blocks == ("layers.1", "layers.3")
    assert report.removed == {"layers (block)": (2, 4)}
    assert "whole blocks masked: layers.1, layers.3, since by channels no group is left" in str(report)
    assert fxprune.prune.channel_report.ChannelReport.from_dict(report.to_dict()) == report
    final = fxprune.finalize(traced)
    assert final.plan is not None
    assert final.plan.macs == report.macs
    assert final.plan.parameters == report.parameters
    small: Any = fxprune.write_back(final, model)
    assert [layer.index for layer in small.layers] == [0, 1]
    assert small.config.layers == 2
    assert torch.equal(small.layers[1].up.weight, model.layers[2].up.weight)
    torch.testing.assert_close(small(X), traced.eval()(X))
    dense = copy.deepcopy(model)
    dense.layers = nn.ModuleList([dense.layers[0], dense.layers[2]])
    torch.testing.assert_close(small(X), dense(X))


def test_a_smaller_budget_ends_where_it_would_have_ended_at_once() -> None:
    model = model_of([1, 0.3, 0.2, 0.1], ratio=1)
    traced, once = (fxprune.trace(model, (X,)) for _ in range(2))
    reports = [fxprune.prune.channels(traced, macs=macs, runnable=model) for macs in (0.8, 0.6, 0.3)]
    assert [len(report.blocks) for report in reports] == [1, 2, 3]
    assert fxprune.prune.channels(once, macs=0.3, runnable=model) == reports[-1]
    assert torch.equal(once(X), traced(X))


def test_channels_go_beside_blocks_where_blocks_alone_do_not_reach() -> None:
    model = model_of([1, 0.1], ratio=2)
    traced = fxprune.trace(model, (X,))
    report = fxprune.prune.channels(traced, macs=0.4, runnable=model)
    assert report.blocks == ("layers.0",) or report.blocks == ("layers.1",)
    assert report.macs[1] <= 0.4 * report.macs[0]
    assert any("up.weight" in name and masked for name, (masked, _) in report.removed.items())
    small: Any = fxprune.write_back(fxprune.finalize(traced), model)
    assert (small.config.layers, small.config.ratio) == (1, 1)
    torch.testing.assert_close(small(X), traced.eval()(X))


def test_blocks_that_are_asked_for_go_without_a_class() -> None:
    layers = nn.Sequential(*(Layer(Numbers(), i) for i in range(3)))
    for layer, size in zip(layers, (1, 2, 0.5), strict=True):
        layer.down.weight.data *= size
        layer.up.weight.data *= size
    model = nn.Sequential(layers, nn.Linear(12, 2)).eval()
    traced = fxprune.trace(model, (X,))
    assert fxprune.prune.channels(traced, 2, kinds="block").blocks == ("0.2", "0.0")
    assert torch.equal(traced.eval()(X), model[1](layers[1](X)))
    final = fxprune.finalize(traced)
    assert final.plan is not None
    assert "0.0.up.weight" in final.plan.dropped

    traced = fxprune.trace(model, (X,))
    report = fxprune.prune.channels(traced, macs=0.5, kinds=("block", "MLP unit"))
    assert report.blocks == ()  # hidden units reach it
    traced = fxprune.trace(model, (X,))
    assert fxprune.prune.channels(traced, macs=0.5, kinds="block", ignore="0.2").blocks == ("0.0", "0.1")
    traced = fxprune.trace(model, (X,))
    assert fxprune.prune.channels(traced, macs=0.8, kinds="block", targets="0.1").blocks == ("0.1",)


def test_blocks_go_by_the_importance_that_is_asked_for() -> None:
    model = model_of([1, 0.1, 1], ratio=1)

    def last(group: fxprune.ChannelGroup) -> Tensor:
        return torch.full((group.size,), 0.0 if group.name.startswith("layers.2") else 1.0)

    traced = fxprune.trace(model, (X,))
    assert fxprune.prune.channels(traced, macs=0.7, runnable=model, importance=last).blocks == ("layers.2",)
    model.layers[0].down.weight.data *= 1e-3  # of no effect, whatever its units have
    model.layers[0].mix.weight.data *= 1e-3
    traced = fxprune.trace(model, (X,))
    report = fxprune.prune.channels(
        traced, macs=0.7, runnable=model, importance="obs", loader=[torch.randn(4, 6, 12) for _ in range(3)]
    )
    assert report.blocks in (("layers.0",), ("layers.1",))


def test_what_cannot_be_reached_says_what_was_tried_and_inserts_nothing() -> None:
    model = model_of([1, 0.1], ratio=1)
    traced = fxprune.trace(model, (X,))
    with pytest.raises(PruningError, match=r"no group is left.*by whole blocks: without layers.1 .* are left"):
        fxprune.prune.channels(traced, macs=0.1, runnable=model)
    with pytest.raises(BudgetError, match=r"macs=0.1 cannot be reached by whole blocks: without layers.1"):
        fxprune.prune.channels(traced, macs=0.1, kinds="block")
    with pytest.raises(BudgetError) as refusal:
        fxprune.prune.channels(traced, macs=0.1, kinds="MLP unit")
    assert f"the best is {refusal.value.least['macs']:,} (" in str(refusal.value)
    with pytest.raises(PruningError, match="at_least=2 keep them"):
        fxprune.prune.channels(traced, macs=0.5, kinds="block", at_least=2)
    with pytest.raises(ArgumentError, match="leave speedup out"):
        fxprune.prune.channels(traced, speedup=2.0, kinds="block")
    with pytest.raises(PruningError, match="no group is left to prune"):
        fxprune.prune.channels(traced, 0.5, runnable=model)  # an amount is of units
    assert not any(name.endswith("_mask") for name, _ in traced.named_buffers())
    plain = fxprune.trace(nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12)), (X,))
    with pytest.raises(PruningError, match="no residual blocks"):
        fxprune.prune.channels(plain, macs=0.5, kinds="block")


class Leaking(Layer):
    """What is inside is read outside, too."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        inner = self.up(self.norm(x)).relu()
        self.seen = inner
        return x + self.down(inner)


class Normed(Layer):
    """A norm follows the sum, so that the block is never the identity."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(self.up(x).relu()))


class Scaled(Layer):
    """Half of the stream."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.down(self.up(x).relu()) - x / 2)


class Plain(Layer):
    """A norm ends the branch."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.down(self.up(x).relu()))


@pytest.mark.parametrize(("kind", "found"), [(Leaking, 0), (Normed, 0), (Scaled, 0), (Plain, 2), (Layer, 2)])
def test_blocks_are_what_gives_what_it_is_given(kind: type[Layer], found: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(kind(Numbers(), i) for i in range(2))
            self.head = nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            more = sum(layer.seen.mean() for layer in self.layers) if kind is Leaking else 0
            return self.head(x) + more

    traced = fxprune.trace(Net().eval(), (X,), modes=("eval",))
    blocks = residual_blocks(traced)
    assert len(blocks) == found
    if found:
        smaller = without(traced, blocks)
        head: Any = traced.get_submodule("head")
        assert torch.equal(smaller(X), nn.functional.linear(X, head.weight, head.bias))


def test_a_block_that_is_called_twice_or_shares_its_last_layer_is_none() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer(Numbers(), i) for i in range(3))
            self.layers[2].down = self.layers[1].down

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[2](self.layers[1](self.layers[0](self.layers[0](x))))

    assert residual_blocks(fxprune.trace(Twice().eval(), (X,), modes=("eval",))) == []
