"""Weights of recurrent layers that read the state are refitted to what the reference's states give."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import PruningError


class Steps(nn.Module):
    """Words through a recurrent layer, and a class for each."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(5, 8, batch_first=True, **options)
        units = (self.rnn.proj_size or 8) * (2 if self.rnn.bidirectional else 1)
        self.head = nn.Linear(units, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])  # type: ignore[no-any-return]


def drawn(kind: str, **options: Any) -> tuple[Steps, Tensor]:
    """A network whose states matter, and sequences."""
    torch.manual_seed(0)
    model = Steps(kind, **options).double().eval().requires_grad_(False)
    for name, weight in model.rnn.named_parameters():
        weight *= 2 if "weight_hh" in name else 1
    return model, torch.randn(60, 7, 5, dtype=torch.float64).cumsum(1) / 2


def halved(model: nn.Module, x: Tensor) -> fxprune.TracedModule:
    """A copy without half of the hidden units."""
    traced = fxprune.trace(copy.deepcopy(model), x, modes=("eval",)).eval()
    fxprune.prune.channels(traced, 0.5, targets="rnn.*", round_to=1)
    return traced


def masked_value(traced: fxprune.TracedModule, name: str) -> Tensor:
    """A parameter as the graph reads it."""
    held = dict([*traced.named_parameters(), *traced.named_buffers()])
    if f"{name}_mask" not in held:
        return held[name]
    return held[f"{name}_orig"] * held[f"{name}_mask"]


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2, "bidirectional": True}])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_the_fit_is_that_of_dense_algebra_over_the_states_of_the_reference(kind: str, options: dict[str, Any]) -> None:
    model, x = drawn(kind, **options)
    traced = halved(model, x)
    report = fxprune.reconstruct(traced, x, damping=0.0)
    layer = options.get("num_layers", 1) - 1
    assert f"rnn.weight_hh_l{layer}" in report.refitted
    ends = ("", "_reverse") if options else ("",)
    for states, end in zip(model.rnn(x)[0].flatten(0, 1).split(8, 1), ends, strict=True):
        weight, bias = (getattr(model.rnn, f"{name}_hh_l{layer}{end}") for name in ("weight", "bias"))
        found, shift = (masked_value(traced, f"rnn.{name}_hh_l{layer}{end}") for name in ("weight", "bias"))
        mask = traced.get_buffer(f"rnn.weight_hh_l{layer}{end}_mask") != 0
        rows, columns = mask.any(1), mask.any(0)
        assert 0 < int(columns.sum()) < 8
        design = torch.cat([states[:, columns], torch.ones(len(states), 1)], 1)
        fitted = torch.linalg.lstsq(design, states @ weight.T + bias).solution.T
        torch.testing.assert_close(found[rows][:, columns], fitted[rows, :-1])
        torch.testing.assert_close(shift[rows], fitted[rows, -1])
        assert not found[:, ~columns].any()


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_outputs_come_nearer_than_with_the_hidden_weights_that_were_there(kind: str, options: dict[str, Any]) -> None:
    model, x = drawn(kind, **options)
    others = torch.randn(300, 7, 5, dtype=torch.float64).cumsum(1) / 2
    traced = halved(model, x)
    kept = {name: value.clone() for name, value in traced.named_parameters() if "_hh_" in name}
    fxprune.reconstruct(traced, x)
    with torch.no_grad():
        error = (traced(others) - model(others)).square().sum()
        for name, value in kept.items():
            traced.get_parameter(name).copy_(value)
        assert error < (traced(others) - model(others)).square().sum()


def test_projected_states_are_read_by_the_columns_that_are_left() -> None:
    model, x = drawn("LSTM", proj_size=4)
    traced = halved(model, x)
    final_before = fxprune.finalize(copy.deepcopy(traced), align=1)
    report = fxprune.reconstruct(traced, x)
    assert "rnn.weight_hh_l0" in report.refitted
    final = fxprune.finalize(copy.deepcopy(traced), align=1)
    torch.testing.assert_close(final(x), traced(x), rtol=0, atol=1e-12)
    assert (traced(x) - model(x)).square().sum() < (final_before(x) - model(x)).square().sum()


def test_entries_that_are_masked_stay_and_the_others_make_up_for_them() -> None:
    model, x = drawn("LSTM")
    traced = fxprune.trace(copy.deepcopy(model), x, modes=("eval",)).eval()
    fxprune.prune.l1_unstructured(traced, "rnn.weight_hh_l0", 0.5)
    mask = traced.get_buffer("rnn.weight_hh_l0_mask").bool()
    before = (traced(x) - model(x)).square().sum()
    assert fxprune.reconstruct(traced, x).refitted[0] == "rnn.weight_hh_l0"
    stored = traced.get_parameter("rnn.weight_hh_l0_orig")
    assert torch.equal(stored[~mask], model.rnn.weight_hh_l0[~mask])
    assert (traced(x) - model(x)).square().sum() < before / 2


def test_hidden_weights_that_are_computed_are_left_alone_and_named() -> None:
    model, x = drawn("LSTM")
    traced = fxprune.trace(copy.deepcopy(model), x, modes=("eval",)).eval()
    fxprune.weight_norm(traced, "rnn.weight_hh_l0")
    fxprune.prune.ln_structured(traced, "rnn.weight_ih_l0", 0.25, n=2, dim=1)
    fxprune.prune.ln_structured(traced, "head.weight", 0.25, n=2, dim=1)
    report = fxprune.reconstruct(traced, x)
    assert any("state of" in name and "computed" in why for name, why in report.alone.items())


def test_padding_has_no_say() -> None:
    model, x = drawn("LSTM")
    counts = torch.ones(60, 7)
    counts[:, 5:] = 0
    noisy = x.clone()
    noisy[:, 5:] *= 100

    def weight(x: Tensor) -> Tensor:
        return counts[: len(x)]

    found = []
    for inputs in (x, noisy):
        traced = halved(model, x)
        fxprune.reconstruct(traced, inputs, weight=weight)
        found.append(masked_value(traced, "rnn.weight_hh_l0"))
    torch.testing.assert_close(*found)


def test_states_that_are_not_finite_are_named_and_nothing_is_changed() -> None:
    model, x = drawn("RNN", nonlinearity="relu")
    model.rnn.weight_hh_l0 *= 1e200
    traced = fxprune.trace(copy.deepcopy(model), x, modes=("eval",)).eval()
    fxprune.prune.custom_from_mask(traced, "rnn.weight_hh_l0", 1 - torch.eye(8))
    before = {name: value.clone() for name, value in traced.state_dict().items()}
    with pytest.raises(PruningError, match=r"NaN or inf come up in the reference at"):
        fxprune.reconstruct(traced, x)
    assert all(torch.equal(value, before[name]) for name, value in traced.state_dict().items())
