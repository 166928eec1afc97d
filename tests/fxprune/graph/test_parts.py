"""What is set on the modules below a traced one: it does what it does in eager, or is refused at once."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import ArgumentError, CaptureError, NameLookupError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Dropout2d(0.5))
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(self.bn(self.conv(x)).relu())
        return self.fc(self.drop(y.mean((2, 3))))


X = torch.randn(6, 3, 5, 5)


@functools.cache
def _captured() -> tuple[Net, fxprune.TracedModule]:
    torch.manual_seed(0)
    model = Net()
    return model, fxprune.trace(copy.deepcopy(model), (X,))


def _pair() -> tuple[Net, fxprune.TracedModule]:
    """A network and its capture, each test's own."""
    model, traced = _captured()
    return copy.deepcopy(model), copy.deepcopy(traced)


def _trains_as(traced: nn.Module, model: nn.Module) -> None:
    """Two steps of SGD, outputs and state the same bits."""
    optimizers = [torch.optim.SGD(module.parameters(), 0.1) for module in (traced, model)]
    for step in range(2):
        outputs = []
        for module, optimizer in zip((traced, model), optimizers, strict=True):
            torch.manual_seed(step)
            outputs.append(module(X))
            optimizer.zero_grad()
            outputs[-1].square().sum().backward()
            optimizer.step()
        assert torch.equal(*outputs)
    for name, value in model.state_dict().items():
        assert torch.equal(traced.state_dict()[name], value), name


SWITCHES: dict[str, Callable[[Any], object]] = {
    "a batch norm": lambda net: net.bn.eval(),
    "a dropout": lambda net: net.drop.eval(),
    "a block": lambda net: net.block.eval(),
    "all but the head": lambda net: [net.conv.eval(), net.bn.eval(), net.block.eval()],
    "a share": lambda net: setattr(net.drop, "p", 0.25),
    "no share": lambda net: setattr(net.drop, "p", 0),
    "the momentum": lambda net: setattr(net.bn, "momentum", 0.5),
    "epsilon": lambda net: setattr(net.bn, "eps", 0.1),
    "by the flag": lambda net: setattr(net.bn, "training", False),
    "off and on again": lambda net: [net.block.eval(), net.block.train()],
    "off, one part on again": lambda net: [net.block.eval(), net.get_submodule("block.2").train()],
    "frozen parameters": lambda net: net.fc.requires_grad_(False),
}


@pytest.mark.parametrize("what", SWITCHES)
def test_a_part_is_switched_as_in_eager(what: str) -> None:
    model, traced = _pair()
    SWITCHES[what](model.train())
    SWITCHES[what](traced.train())
    _trains_as(traced, model)
    assert torch.equal(traced.eval()(X), model.eval()(X))


def _stored(traced: fxprune.TracedModule, folder: Path, model: nn.Module | None) -> fxprune.TracedModule:
    fxprune.save(traced, folder / "model.fxp")
    return fxprune.load(folder / "model.fxp", model)


COPIES: dict[str, Callable[[fxprune.TracedModule, Path], fxprune.TracedModule]] = {
    "eval and train": lambda traced, folder: traced.eval().train(),
    "a copy": lambda traced, folder: copy.deepcopy(traced),
    "finalize": lambda traced, folder: fxprune.finalize(traced),
    "a checkpoint": lambda traced, folder: _stored(traced, folder, None),
    "a checkpoint and the model": lambda traced, folder: _stored(traced, folder, Net()),
    "a run of the sample": lambda traced, folder: [traced, traced.run_example("eval")][0],  # type: ignore[list-item, return-value]
}


@pytest.mark.parametrize("way", COPIES)
def test_what_was_set_stays(way: str, tmp_path: Path) -> None:
    model, traced = _pair()
    for net in (model.train(), traced.train()):
        net.bn.eval()  # type: ignore[operator, union-attr]
        net.block.eval()  # type: ignore[operator, union-attr]
        net.get_submodule("block.2").train()
        net.drop.p = 0.125  # type: ignore[union-attr]
    again = COPIES[way](traced, tmp_path)
    _trains_as(again.train(), model)
    assert not again.get_submodule("bn").training
    assert again.get_submodule("block.2").training
    again.get_submodule("bn").train()
    model.bn.train()
    _trains_as(again, model)


def test_switching_a_copy_leaves_the_original_alone() -> None:
    model, traced = _pair()
    clone = copy.deepcopy(traced)
    clone.get_submodule("bn").eval()
    copy.deepcopy(traced.get_submodule("bn")).eval()
    _trains_as(traced.train(), model.train())


@pytest.mark.parametrize("names", [None, "*", ["bn", "block.*"]])
def test_batch_norms_are_frozen_by_name(names: Any) -> None:
    model, traced = _pair()
    assert fxprune.freeze_batch_norms(traced.train(), names) is traced
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    _trains_as(traced, model)


def test_names_that_are_no_batch_norm_are_refused() -> None:
    _, traced = _pair()
    with pytest.raises(NameLookupError, match="batch norm"):
        fxprune.freeze_batch_norms(traced, "fc")
    with pytest.raises(NameLookupError, match="none with running statistics"):
        fxprune.freeze_batch_norms(fxprune.trace(nn.Linear(2, 2), (torch.randn(2, 2),)))


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="both modes of attention were captured otherwise before")
def test_attention_drops_nothing_while_it_is_off(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
    x = torch.randn(2, 5, 8)
    traced = fxprune.trace(model, (x,)).train()
    traced.get_submodule("self_attn").eval()
    traced = _stored(traced, tmp_path, None)
    model.train().self_attn.eval()
    for _ in range(2):
        torch.manual_seed(1)
        expected = model(x)
        torch.manual_seed(1)
        assert torch.allclose(traced(x), expected, atol=1e-6)
        model.train()
        traced.get_submodule("self_attn").train()


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu() if self.training else x.sigmoid()


REFUSED: dict[str, tuple[Callable[[Any], object], type[Exception], str]] = {
    "a layer": (lambda net: setattr(net, "fc", nn.Linear(4, 2)), CaptureError, "eager model"),
    "a layer below": (
        lambda net: setattr(net.get_submodule("block"), "0", nn.Conv2d(4, 4, 1)),
        CaptureError,
        "block.0",
    ),
    "a layer for nothing": (lambda net: setattr(net, "drop", None), CaptureError, "'drop'"),
    "a new one below": (lambda net: setattr(net.block, "extra", nn.ReLU()), CaptureError, "eager model"),
    "an attribute": (lambda net: setattr(net.conv, "stride", 2), CaptureError, "conv.stride"),
    "p of no dropout": (lambda net: setattr(net.fc, "p", 0.5), CaptureError, "fc.p"),
    "p above one": (lambda net: setattr(net.drop, "p", 1.5), ArgumentError, "from 0 to 1"),
    "no momentum": (lambda net: setattr(net.bn, "momentum", None), ArgumentError, "bn.momentum"),
    "a forward hook": (lambda net: net.fc.register_forward_hook(print), CaptureError, "hook"),
    "a forward pre-hook": (lambda net: net.fc.register_forward_pre_hook(print), CaptureError, "hook"),
    "a backward hook": (lambda net: net.fc.register_full_backward_hook(print), CaptureError, "hook"),
    "a backward pre-hook": (lambda net: net.fc.register_full_backward_pre_hook(print), CaptureError, "hook"),
    "an old backward hook": (lambda net: net.fc.register_backward_hook(print), CaptureError, "hook"),
    "a call": (lambda net: net.block(X), CaptureError, "trace it as a model of its own"),
    "a part on while the whole is off": (lambda net: net.eval().drop.train(), CaptureError, "traced.train"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_graphs_cannot_express_is_refused_and_changes_nothing(what: str) -> None:
    model, traced = _pair()
    act, kind, message = REFUSED[what]
    with pytest.raises(kind, match=message):
        act(traced.train())
    _trains_as(traced.train(), model.train())


def test_a_forward_with_other_operators_in_train_mode_is_not_switched() -> None:
    model = nn.Sequential(nn.Linear(3, 4), Branching(), nn.Dropout(0.5))
    traced = fxprune.trace(model, (torch.randn(2, 3),)).train()
    before = traced.code
    with pytest.raises(CaptureError, match="before fxprune.trace"):
        traced.get_submodule("1").eval()
    assert traced.code == before
    assert traced.get_submodule("1").training


def test_the_flag_of_the_whole_selects_the_graph() -> None:
    model, traced = _pair()
    traced.training = False
    assert torch.equal(traced(X), model.eval()(X))
