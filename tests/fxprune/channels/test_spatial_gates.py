"""Gates over tokens: a linear layer or a convolution of one tap mixes the tokens of each channel by itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import fxprune
from tests.fxprune.channels.exactness import EXACT, error

TOKENS, WIDTH, HIDDEN = 5, 8, 12
FORMS = ("linear", "conv1d", "conv1d in groups", "conv2d")


class Gate(nn.Module):
    """One half of the channels times the other, normalized and mixed over tokens."""

    def __init__(self, form: str, bias: bool = True) -> None:
        super().__init__()
        self.form, self.norm = form, nn.LayerNorm(HIDDEN)
        if form == "linear":
            self.proj: nn.Module = nn.Linear(TOKENS, TOKENS, bias)
        elif form == "conv2d":
            self.proj = nn.Conv2d(TOKENS, TOKENS, 1, bias=bias)
        else:
            self.proj = nn.Conv1d(TOKENS, TOKENS, 1, groups=TOKENS if "groups" in form else 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        u, v = x.chunk(2, -1)
        v = self.norm(v)
        if self.form == "linear":
            return u * self.proj(v.transpose(-1, -2)).transpose(-1, -2)
        mixed: Tensor = self.proj(v[..., None])[..., 0] if self.form == "conv2d" else self.proj(v)
        return u * mixed


class Mixer(nn.Module):
    """A layer, two blocks with gates around a stream, and a head."""

    def __init__(self, form: str, bias: bool = True) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(6, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(WIDTH, 2 * HIDDEN) for _ in range(2))
        self.gates = nn.ModuleList(Gate(form, bias) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(HIDDEN, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm, up, gate, down in zip(self.norms, self.ups, self.gates, self.downs, strict=True):
            x = x + down(gate(F.gelu(up(norm(x)))))
        y: Tensor = self.head(self.norm(x).mean(1))
        return y


def mixer(form: str, *halves: str, bias: bool = True) -> Mixer:
    """A mixer whose first 4 channels of these halves are zero, with gain and shift of the second."""
    torch.manual_seed(0)
    model = Mixer(form, bias).double().eval()
    with torch.no_grad():
        for up, gate in zip(model.ups, model.gates, strict=True):
            for half in halves:
                rows: Any = slice(4) if half == "first" else slice(HIDDEN, HIDDEN + 4)
                up.weight[rows] = up.bias[rows] = 0
                if half == "second":
                    gate.norm.weight[:4] = gate.norm.bias[:4] = 0
    return model


def finalized(model: nn.Module, **options: Any) -> fxprune.TracedModule:
    """What is left of a model, which computes the same."""
    traced = fxprune.trace(copy.deepcopy(model), torch.randn(2, TOKENS, 6).double(), modes=("eval",), **options)
    final = fxprune.finalize(traced.eval(), align=1)
    assert_equal(model, final)
    return final


def assert_equal(model: nn.Module, final: nn.Module) -> None:
    for batch in (1, 2, 5):
        x = torch.randn(batch, TOKENS, 6).double()
        with torch.no_grad():
            assert error(model(x), final(x)) < EXACT


@pytest.mark.parametrize("form", FORMS)
def test_channels_that_are_dead_in_both_halves_go(form: str) -> None:
    final = finalized(mixer(form, "first", "second"))
    for block in range(2):
        assert final.get_parameter(f"ups.{block}.weight").shape == (2 * HIDDEN - 8, WIDTH)
        assert final.get_parameter(f"downs.{block}.weight").shape == (WIDTH, HIDDEN - 4)
        assert final.get_parameter(f"gates.{block}.norm.weight").shape == (HIDDEN - 4,)


@pytest.mark.parametrize("form", FORMS)
def test_without_a_bias_a_gate_that_is_zero_is_enough(form: str) -> None:
    final = finalized(mixer(form, "second", bias=False))
    assert final.get_parameter("ups.0.weight").shape == (2 * HIDDEN - 8, WIDTH)


@pytest.mark.parametrize("form", FORMS)
def test_a_bias_over_tokens_keeps_what_it_gates_and_the_plan_says_so(form: str) -> None:
    final = finalized(mixer(form, "second"))
    assert final.get_parameter("ups.0.weight").shape == (2 * HIDDEN, WIDTH)
    assert final.plan is not None
    assert "in downs.0) reads it" in final.plan.explain()


@pytest.mark.parametrize("form", FORMS)
def test_the_channels_are_groups_with_both_halves(form: str) -> None:
    model = mixer(form)
    traced = fxprune.trace(model, torch.randn(2, TOKENS, 6).double())
    (group,) = [g for g in fxprune.channel_groups(traced) if "ups.0.weight" in str(g)]
    assert (group.size, group.reason) == (HIDDEN, None)
    report = fxprune.prune.channels(traced, macs=0.6, kinds="width", round_to=1)
    final = fxprune.finalize(traced.eval(), align=1)
    assert_equal(traced.eval(), final)
    assert final.plan is not None
    assert report.macs == final.plan.macs
    before, after = final.plan.macs
    assert 0.5 < after / before <= 0.6
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        final(torch.randn(1, TOKENS, 6).double())
    assert counter.get_total_flops() == 2 * after


def test_more_taps_read_neighbouring_channels_which_stay() -> None:
    model = mixer("conv1d", "first", "second")
    for gate in model.gates:
        gate.proj = nn.Conv1d(TOKENS, TOKENS, 3, padding=1).double()
    final = finalized(model)
    assert final.get_parameter("ups.0.weight").shape == (2 * HIDDEN, WIDTH)
    assert final.plan is not None
    assert "space of a convolution" in final.plan.explain()


@pytest.mark.parametrize("form", FORMS)
def test_files_compute_the_same(form: str, tmp_path: Path) -> None:
    model = mixer(form, "first", "second").float()
    final = fxprune.finalize(fxprune.trace(model, torch.randn(2, TOKENS, 6), modes=("eval",)), align=1)
    fxprune.export.to_onnx(final, tmp_path / "model.onnx")
    for batch in (1, 3):
        assert fxprune.compare(model, tmp_path / "model.onnx", inputs=torch.randn(batch, TOKENS, 6)).ok


def test_a_budget_that_only_the_width_could_meet_says_how_to_ask_for_it() -> None:
    traced = fxprune.trace(mixer("conv1d"), torch.randn(2, TOKENS, 6).double(), modes=("eval",))
    with pytest.raises(fxprune.errors.PruningError, match='3 of the kind "width", which kinds="width" asks for'):
        fxprune.prune.channels(traced, macs=0.5)
