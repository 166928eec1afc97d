"""Widths that one fraction of a configuration gives together, each rounded: the choice is among its values."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import BudgetError
from fxprune.graph.configurations import Configuration


class Fraction:
    """A configuration as libraries have it."""

    def __init__(self, multiplier: float = 0.7) -> None:
        self.multiplier, self.labels = multiplier, 5

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Rounded(nn.Module):
    """Convolutions whose widths are rounded down from products."""

    config_class: ClassVar[type] = Fraction

    def __init__(self, config: Fraction) -> None:
        super().__init__()
        self.config = config
        sizes = [max(int(size * config.multiplier), 4) for size in (16, 32, 44)]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip([3, *sizes], sizes, strict=False))
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for size in sizes)
        self.head = nn.Linear(sizes[-1], config.labels)

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(layer(x)).relu()
        y: Tensor = self.head(x.mean((2, 3)))
        return y


class Eights(nn.Module):
    """Convolutions whose widths are products rounded to multiples of eight, and a last one of a width of its own."""

    config_class: ClassVar[type] = Fraction

    def __init__(self, config: Fraction) -> None:
        super().__init__()
        self.config = config
        sizes = [max(int(size * config.multiplier + 4) // 8 * 8, 8) for size in (16, 32, 48)]
        sizes += [getattr(config, "top", 20)]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip([3, *sizes], sizes, strict=False))
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for size in sizes)
        self.head = nn.Linear(sizes[-1], config.labels)

    forward = Rounded.forward


def _settled(model: nn.Module) -> nn.Module:
    """With batch norms that are not at their start."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.2), nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize(("importance", "budget"), [("l2", {"macs": 0.6}), ("l1", {"parameters": 0.5})])
def test_every_width_is_what_the_class_makes_of_one_value(importance: str, budget: dict[str, float]) -> None:
    torch.manual_seed(0)
    model = _settled(Rounded(Fraction()))
    x = torch.randn(2, 3, 8, 8)
    traced = fxprune.trace(model, x, modes=("eval",))
    report = fxprune.prune.channels(traced, **budget, importance=importance, runnable=model)  # type: ignore[arg-type]
    small = fxprune.write_back(fxprune.finalize(traced), model)
    name, value = next(iter(budget.items()))
    before, after = getattr(report, name)
    assert 0.4 * value < after / before <= value
    fraction: Any = small.config.multiplier  # type: ignore[union-attr]
    assert fraction < 0.7
    again = Rounded(Fraction(fraction)).eval()
    again.load_state_dict(small.state_dict())
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(again(x), traced(x), rtol=1e-4, atol=1e-5)
    assert model.config.multiplier == 0.7


def test_widths_that_are_rounded_to_eight_go_by_values_of_the_fraction_though_the_last_layer_has_its_own() -> None:
    torch.manual_seed(0)
    config = Fraction(1.0)
    config.top = 20  # type: ignore[attr-defined]
    model = _settled(Eights(config))
    x = torch.randn(2, 3, 8, 8)
    traced = fxprune.trace(model, (x,), modes=("eval",))
    report = fxprune.prune.channels(traced, macs=0.7, runnable=model)
    final = fxprune.finalize(traced)
    small = fxprune.write_back(final, model)
    assert 0.4 < report.macs[1] / report.macs[0] <= 0.7  # half of each would leave 0.25
    assert [layer.out_channels for layer in small.layers] == [8, 24, 32, 20]
    again = Eights(copy.deepcopy(small.config))
    again.load_state_dict(small.state_dict())
    torch.testing.assert_close(again.eval()(x), final(x))


def test_what_stays_is_what_matters_most() -> None:
    torch.manual_seed(0)
    model = _settled(Rounded(Fraction()))
    with torch.no_grad():
        model.layers[1].weight[[0, 5, 9]] *= 1e-3  # type: ignore[index]
        model.norms[1].weight[[0, 5, 9]] *= 1e-3  # type: ignore[index]
    traced = fxprune.trace(model, torch.randn(2, 3, 8, 8), modes=("eval",))
    fxprune.prune.channels(traced, macs=0.8, runnable=model)
    kept = fxprune.finalize(traced).plan.kept["layers.1.weight"][0].tolist()  # type: ignore[union-attr]
    assert not {0, 5, 9} & set(kept)


def test_a_budget_below_the_smallest_of_them_is_refused_and_changes_nothing() -> None:
    model = _settled(Rounded(Fraction()))
    traced = fxprune.trace(model, torch.randn(2, 3, 8, 8), modes=("eval",))
    with pytest.raises(BudgetError, match="cannot be reached"):
        fxprune.prune.channels(traced, macs=0.001, runnable=model)
    with pytest.raises(BudgetError, match="cannot be reached"):
        fxprune.prune.channels(traced, macs=0.3, runnable=model, max_per_group=0.05)
    assert not [name for name, _ in traced.named_buffers() if name.endswith("_mask")]


def test_a_fraction_is_found_from_sizes_that_are_rounded() -> None:
    configuration = Configuration.of(Rounded(Fraction()))
    assert configuration is not None
    for value in (0.63, 0.41, 0.2511):
        wanted = Configuration(Rounded(Fraction(value))).shapes
        found = next(configuration.expressing(wanted))
        assert Configuration(Rounded(Fraction(found["multiplier"]))).shapes == wanted
    uneven = dict(Configuration(Rounded(Fraction(0.41))).shapes)
    uneven |= {"layers.2.weight": (30, 13, 3, 3), "head.weight": (5, 30)}
    uneven |= {f"norms.2.{name}": (30,) for name in ("weight", "bias", "running_mean", "running_var")}
    uneven["layers.2.bias"] = (30,)
    assert next(configuration.expressing(uneven), None) is None


@pytest.mark.parametrize("kind", ["MobileNetV1", pytest.param("MobileNetV2", marks=pytest.mark.slow)])
def test_a_mobile_network_comes_back_through_from_pretrained(kind: str, transformers: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(depth_multiplier=0.4, num_labels=3)
    model: Any = _settled(getattr(transformers, f"{kind}ForImageClassification")(config))
    sample = {"pixel_values": torch.randn(2, 3, 32, 32)}
    traced = fxprune.trace(model, (), sample, modes=("eval",))
    report = fxprune.prune.channels(traced, macs=0.75, runnable=model)
    assert 0.5 * report.macs[0] < report.macs[1] <= 0.75 * report.macs[0]
    small: Any = fxprune.write_back(fxprune.finalize(traced), copy.deepcopy(model))
    assert small.config.depth_multiplier < 0.4
    small.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    x = torch.randn(3, 3, 32, 32)
    want = traced(pixel_values=x).logits
    assert want.std() > 1e-4
    torch.testing.assert_close(again(x).logits, want, rtol=1e-3, atol=1e-5)
