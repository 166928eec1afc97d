"""`reconstruct` in use: progress, references, training in between, reports, and input that it cannot take."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import ArgumentError, ArgumentTypeError, FxpruneError, InputError, PruningError
from tests.repairs import SAMPLES, Chain, masked, mlp


def test_rows_that_do_not_count_change_nothing() -> None:
    torch.manual_seed(0)
    model = Chain(nn.Linear(3, 6), nn.Linear(6, 4)).double().eval()
    x = torch.randn(SAMPLES, 5, 3, dtype=torch.float64)
    other = x.clone()
    other[:, 3:] = torch.randn(SAMPLES, 2, 3, dtype=torch.float64) * 9
    found = []
    for batch in (x, other):
        traced = masked(model, x)
        fxprune.reconstruct(traced, batch, weight=lambda inputs: torch.arange(5).expand(len(inputs), 5) < 3)
        found.append(traced.get_parameter("reader.weight"))
    assert torch.equal(*found)


def test_a_reference_is_the_model_from_before_training_or_a_traced_one() -> None:
    model, x = mlp()
    results = []
    for reference in (None, copy.deepcopy(model), fxprune.trace(copy.deepcopy(model), (x[:2],), modes=("eval",))):
        traced = masked(model, x)
        fxprune.reconstruct(traced, x, reference=reference)
        results.append(traced.get_parameter("reader.weight"))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_weights_that_changed_since_they_were_masked_need_a_reference() -> None:
    model, x = mlp()
    traced = masked(model, x)
    fxprune.reconstruct(traced, x)  # the reader has no mask: the reference is what it was
    optimizer = torch.optim.SGD(traced.parameters(), 0.1)
    traced(x).square().sum().backward()
    optimizer.step()
    with pytest.raises(PruningError, match=r"first\.weight, first\.bias changed since they were masked.*reference="):
        fxprune.reconstruct(traced, x)
    before = (traced(x) - model(x)).square().sum()
    fxprune.reconstruct(traced, x, reference=model)
    assert (traced(x) - model(x)).square().sum() < before


def test_pruning_and_repair_alternate_towards_one_reference() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 2)).eval()
    x, own = torch.randn(200, 3), copy.deepcopy(model)
    traced = fxprune.trace(own, (x[:2],), modes=("eval",))
    for amount in (0.25, 0.5):
        fxprune.prune.channels(traced, amount, round_to=1)
        unrepaired = (traced(x) - model(x)).square().mean()
        report = fxprune.reconstruct(traced, x, reference=model)
        assert report.refitted
        assert (traced(x) - model(x)).square().mean() < 0.5 * unrepaired
    final = fxprune.finalize(traced)
    assert final.get_parameter("4.weight").shape[1] < 24
    torch.testing.assert_close(final(x), traced(x))


def test_the_report_prints_and_is_data_and_says_what_was_left_alone() -> None:
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.twice, self.last = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.twice(torch.tanh(self.first(x))))
            return self.last(torch.tanh(hidden @ self.twice.weight))

    model, x = Tied().eval(), torch.randn(SAMPLES, 3)
    traced = masked(model, x)
    report = fxprune.reconstruct(traced, x)
    assert isinstance(report, fxprune.ReconstructionReport)
    assert report.refitted == ["last.weight"]
    assert report.samples == (32, 8)
    assert set(report.alone.values()) == {
        "its weight is used by 2 calls, which are not alike", "it computes what the reference does",
    }  # fmt: skip
    assert "1 of 1 reader refitted" in str(report)
    assert "used by 2 calls" in report.table()
    assert json.loads(json.dumps(report.to_dict()))["readers"]["last.weight"]["rows"] == 32


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (InputError, "Of batches with labels give the inputs alone", lambda x: {"batches": [[x, x[:, 0].long()]]}),
        (InputError, "inputs alone", lambda x: {"batches": torch.utils.data.DataLoader([(x[0], 1), (x[1], 0)], 2)}),
        (InputError, "shape", lambda x: {"batches": [x, x[:, :2]]}),
        (ArgumentError, "hold 0 samples", lambda x: {"batches": iter(())}),
        (ArgumentError, "hold 1 samples", lambda x: {"batches": x[:1]}),
        (ArgumentError, "numbers of 0 or more", lambda x: {"batches": x, "damping": -1.0}),
        (ArgumentTypeError, "damping", lambda x: {"batches": x, "damping": "little"}),
        (ArgumentError, "empty", lambda x: {"batches": x, "damping": []}),
        (ArgumentTypeError, "a module is needed", lambda x: {"batches": x, "reference": {}}),
        (ArgumentError, "no parameter 'reader.weight'", lambda x: {"batches": x, "reference": nn.Linear(3, 6)}),
        (
            ArgumentError, "shape",
            lambda x: {"batches": x, "reference": Chain(nn.Linear(3, 5), nn.Linear(5, 4))},
        ),
        (ArgumentError, "weight gave", lambda x: {"batches": x, "weight": lambda inputs: 1}),
        (ArgumentError, "0 rows to fit", lambda x: {"batches": x, "weight": lambda inputs: torch.zeros(len(inputs))}),
        (PruningError, "NaN or inf .* at `x`", lambda x: {"batches": torch.where(x == x[3, 0], torch.nan, x)}),
    ],
)  # fmt: skip
def test_bad_input_is_named_and_changes_nothing(
    error: type[FxpruneError], match: str, options: Callable[[Tensor], dict[str, Any]]
) -> None:
    model, x = mlp()
    traced = masked(model, x)
    before = {name: tensor.clone() for name, tensor in traced.state_dict().items()}
    with pytest.raises(error, match=match):
        fxprune.reconstruct(traced, **options(x))
    assert all(torch.equal(tensor, before[name]) for name, tensor in traced.state_dict().items())


def test_an_error_after_the_first_fit_takes_it_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    x = torch.randn(SAMPLES, 3)
    traced = fxprune.trace(model, (x[:2],), modes=("eval",))
    fxprune.prune.l1_unstructured(traced, "0.weight", 4)
    with torch.no_grad():
        traced.get_parameter("4.weight").fill_(torch.inf)
    before = {name: tensor.clone() for name, tensor in traced.state_dict().items()}
    with pytest.raises(PruningError, match=r"the reference at `_4_weight`"):
        fxprune.reconstruct(traced, x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in traced.state_dict().items())
    with torch.no_grad():
        traced.get_parameter("4.weight").fill_(1.0)
    assert fxprune.reconstruct(traced, x).refitted  # what was taken back counts as never changed


def test_what_has_nothing_to_repair_is_refused() -> None:
    model, x = mlp()
    traced = fxprune.trace(model, (x[:2],), modes=("eval",))
    with pytest.raises(PruningError, match="nothing is masked"):
        fxprune.reconstruct(traced, x)
    with pytest.raises(ArgumentTypeError, match=r"fxprune\.trace"):
        fxprune.reconstruct(model, x)
    pointwise = fxprune.trace(nn.BatchNorm1d(3).double().eval(), (x[:2],), modes=("eval",))
    fxprune.prune.l1_unstructured(pointwise, "weight", 1)
    with pytest.raises(PruningError, match="no reader can be refitted"):
        fxprune.reconstruct(pointwise, x)


def test_constant_inputs_and_dead_channels_leave_finite_weights() -> None:
    model, x = mlp()
    traced = masked(model, x)
    fxprune.reconstruct(traced, torch.ones_like(x))
    torch.testing.assert_close(traced(torch.ones_like(x)), model(torch.ones_like(x)))  # the bias makes up for all


def test_fewer_rows_than_unknowns_are_said_and_leave_finite_weights() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 2)).eval(), torch.randn(400, 3)
    traced = fxprune.trace(copy.deepcopy(model), (x[:2],), modes=("eval",)).eval()
    fxprune.prune.l1_unstructured(traced, "0.weight", 0.5)
    report = fxprune.reconstruct(traced, x[:12], damping=(0.0, 1e-2))
    assert "fewer rows than unknowns, which damping makes up for: 2.weight" in str(report)
    assert torch.isfinite(traced(x)).all()
    again = fxprune.reconstruct(traced, x, reference=model)
    assert "fewer rows" not in again.table()


def test_a_model_that_was_repaired_is_no_reference_for_other_masks() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 12), nn.Tanh(), nn.Linear(12, 2)).eval(), torch.randn(80, 3)
    dense, target = copy.deepcopy(model), model(x).detach()
    traced = fxprune.trace(model, (x[:2],), modes=("eval",)).eval()
    fxprune.prune.l1_unstructured(traced, "0.weight", 0.5)
    fxprune.reconstruct(traced, x)
    with pytest.raises(PruningError, match=r"0\.weight changed since they were masked"):
        fxprune.reconstruct(traced, x)
    other = fxprune.trace(model, (x[:2],), modes=("eval",)).eval()  # the same parameters
    fxprune.prune.ln_structured(other, "0.weight", 0.5, n=2, dim=0)
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(PruningError, match=r"2\.weight.* were refitted by an earlier reconstruction.*Trace a copy"):
        fxprune.reconstruct(other, x)
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
    before = (other(x) - target).square().sum()
    fxprune.reconstruct(other, x, reference=dense)
    assert (other(x) - target).square().sum() < before


def under_norms(norm: str, *names: str) -> tuple[fxprune.TracedModule, Tensor, Tensor]:
    """A network with norms and channels masked by data, its inputs, and its outputs before it was masked."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    for name in names:
        getattr(nn.utils.parametrizations, norm)(model.get_submodule(name))
    x = torch.randn(200, 8)
    traced = fxprune.trace(model.eval(), x[:2]).eval()
    target = traced(x).detach()
    sensitivity = fxprune.sensitivity(traced, x, distance="error")
    fxprune.prune.channels(traced, macs=0.6, importance=sensitivity, round_to=1)
    return traced, x, target


def test_layers_under_spectral_norms_are_left_alone_while_others_make_up_for_them() -> None:
    traced, x, target = under_norms("spectral_norm", "2")
    before = (traced(x) - target).square().sum()
    report = fxprune.reconstruct(traced, x)
    assert report.refitted == ["4.weight"]
    assert "its weight is computed, and not every fit can be computed so" in report.alone.values()
    assert (traced(x) - target).square().sum() < before


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_networks_under_norms_alone_are_repaired_once_these_are_taken_away(norm: str) -> None:
    names = ("0", "2", "4")
    traced, x, target = under_norms(norm, *names)
    state = {name: tensor.clone() for name, tensor in traced.state_dict().items()}
    if norm == "spectral_norm":  # a weight norm can compute every fit
        with pytest.raises(PruningError, match="is computed.*fxprune.remove_spectral_norm"):
            fxprune.reconstruct(traced, x)
    assert all(torch.equal(tensor, state[name]) for name, tensor in traced.state_dict().items())
    before = (traced(x) - target).square().sum()
    for name in names:
        getattr(fxprune, f"remove_{norm}")(traced, f"{name}.weight")
    report = fxprune.reconstruct(traced, x)
    assert "2.weight" in report.refitted
    assert (traced(x) - target).square().sum() < 0.3 * before
    torch.testing.assert_close(fxprune.finalize(traced)(x), traced(x), rtol=1e-4, atol=1e-5)
