"""Weights that a weight norm computes are refitted in its own parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as legacy_weight_norm

import fxprune
from fxprune.errors import PruningError

FORMS = [parametrizations.weight_norm, legacy_weight_norm]


def layers(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    sizes = ((8, 32), (32, 32), (32, 4))
    first, second, last = (nn.Linear(*size, bias=bias) for size in sizes)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last).double().eval()


def normed(model: nn.Sequential, form: Any, **options: Any) -> nn.Sequential:
    """The model with a norm on every weight, whose lengths are other than those of v."""
    for layer in (model[0], model[2], model[4]):
        form(layer, **options)
        with torch.no_grad():
            v = [p for name, p in layer.named_parameters() if name.endswith(("_v", "original1"))]
            v[0].mul_(torch.rand(len(v[0]), 1) + 0.5 if options.get("dim", 0) == 0 else 3.0)
    return model


def repaired(model: nn.Module, x: Tensor, **options: Any) -> tuple[fxprune.TracedModule, fxprune.ReconstructionReport]:
    traced = fxprune.trace(model, (x[:2],)).eval()
    fxprune.prune.channels(traced, macs=0.5, round_to=1)
    return traced, fxprune.reconstruct(traced, x, **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dim", [0, 1, None])
def test_repair_under_a_weight_norm_is_that_of_the_plain_network(form: Any, dim: int | None) -> None:
    x = torch.randn(120, 8).double()
    plain, _ = repaired(layers(), x)
    traced, report = repaired(normed(layers(), form, dim=dim), x)
    assert report.refitted == ["2.weight", "4.weight"]
    torch.testing.assert_close(traced(x), plain(x), rtol=1e-9, atol=1e-9)
    final = fxprune.finalize(traced)
    torch.testing.assert_close(final(x), traced(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_the_norm_stays_and_trains_on_in_the_model_that_was_traced(form: Any) -> None:
    x, model = torch.randn(120, 8).double(), normed(layers(), form)
    names = {name for name, _ in model.named_parameters()}
    traced, _ = repaired(model, x)
    assert {name.replace("_orig", "") for name, _ in traced.named_parameters()} == names
    before = traced(x).detach()
    optimizer = torch.optim.SGD(traced.parameters(), 0.1)
    traced.train()(x).square().mean().backward()
    optimizer.step()
    assert traced.eval()(x).square().mean() < before.square().mean()


@pytest.mark.parametrize("form", FORMS)
def test_convolutions_and_recurrent_layers_under_weight_norms_are_repaired(form: Any) -> None:
    class Speech(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = form(nn.Conv1d(3, 16, 3, padding=1)), form(nn.ConvTranspose1d(16, 12, 4, 2, 1))
            self.third, self.last = nn.LSTM(12, 10, batch_first=True), form(nn.Linear(10, 3))
            for name in ("weight_ih_l0", "weight_hh_l0"):
                form(self.third, name)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(torch.relu(self.first(x))).tanh()
            z: Tensor = self.last(self.third(y.transpose(1, 2))[0])
            return z

    torch.manual_seed(0)
    model, x = Speech().double().eval(), torch.randn(30, 3, 9).double()
    dense = model(x).detach()
    traced = fxprune.trace(model, (x[:2],), modes=("eval",)).eval()
    fxprune.prune.channels(traced, 0.4, round_to=1)
    before = (traced(x) - dense).square().sum()
    report = fxprune.reconstruct(traced, x)
    assert set(report.refitted) == {"second.weight", "third.weight_ih_l0", "third.weight_hh_l0", "last.weight"}
    assert (traced(x) - dense).square().sum() < 0.5 * before
    torch.testing.assert_close(fxprune.finalize(traced)(x), traced(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_traced", [False, True])
def test_a_reference_may_carry_the_norm(form: Any, is_traced: bool) -> None:
    x, model = torch.randn(120, 8).double(), normed(layers(), form)
    reference: nn.Module = normed(layers(), form)
    reference.load_state_dict(copy.deepcopy(model.state_dict()))
    dense = reference(x).detach()
    traced = fxprune.trace(model, (x[:2],)).eval()
    fxprune.prune.channels(traced, macs=0.5, round_to=1)
    with torch.no_grad():
        traced.get_parameter("2.bias_orig").add_(0.1)
    before = (traced(x) - dense).square().sum()
    fxprune.reconstruct(traced, x, reference=fxprune.trace(reference, (x[:2],)) if is_traced else reference)
    assert (traced(x) - dense).square().sum() < 0.1 * before
    torch.testing.assert_close(reference(x), dense)


def test_a_legacy_reference_is_what_its_parameters_say_not_what_it_computed_last() -> None:
    x, model = torch.randn(120, 8).double(), normed(layers(), legacy_weight_norm)
    reference = normed(layers(), legacy_weight_norm)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.1)  # `weight` is from before that
    traced = fxprune.trace(model, (x[:2],)).eval()
    fxprune.prune.channels(traced, macs=0.5, round_to=1)
    fxprune.reconstruct(traced, x, reference=reference)
    dense = reference(x)
    assert (traced(x) - dense).square().sum() < 0.02 * dense.square().sum()


@pytest.mark.parametrize("form", FORMS)
def test_what_a_mask_lies_on_is_known_to_have_changed_with_what_it_is_computed_from(form: Any) -> None:
    x = torch.randn(120, 8).double()
    traced, _ = repaired(normed(layers(bias=False), form), x, new_biases=False)
    with pytest.raises(PruningError, match=r"2\.weight.* changed since they were masked"):
        fxprune.reconstruct(traced, x)


def test_an_error_leaves_norms_as_they_were() -> None:
    x, model = torch.randn(120, 8).double(), normed(layers(), parametrizations.weight_norm)
    traced = fxprune.trace(model, (x[:2],)).eval()
    fxprune.prune.channels(traced, macs=0.5, round_to=1)
    with torch.no_grad():
        traced.get_parameter("4.bias").fill_(torch.inf)
    state = {name: tensor.clone() for name, tensor in traced.state_dict().items()}
    with pytest.raises(PruningError, match="NaN or inf"):
        fxprune.reconstruct(traced, x)
    for name, tensor in traced.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0, equal_nan=True)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_weights_that_a_norm_alone_does_not_compute_are_left_alone_with_the_reason() -> None:
    x, model = torch.randn(120, 8).double(), layers()
    parametrizations.weight_norm(model[2])
    nn.utils.parametrize.register_parametrization(model[2], "weight", Doubled())
    _, report = repaired(model, x)
    assert report.refitted == ["4.weight"]
    assert "its weight is computed, and not every fit can be computed so" in report.alone.values()
