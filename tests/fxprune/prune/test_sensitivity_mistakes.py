"""What `fxprune.sensitivity` and the importance "obs" refuse, and input of which they make a right result."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxprune
from fxprune.errors import ArgumentError, ArgumentTypeError, InputError, PruningError

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
NAN = X.index_fill(0, torch.tensor(3), float("nan"))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).eval()


def trace(model: nn.Module, x: Tensor = X, **options: Any) -> fxprune.TracedModule:
    return fxprune.trace(model.eval(), (x[:2].clone(),), **{"modes": ("eval",), **options})


@pytest.fixture(scope="module")
def captured() -> fxprune.TracedModule:
    return trace(network())


def measured(**options: Any) -> Callable[[fxprune.TracedModule], object]:
    return lambda traced: fxprune.sensitivity(traced, **{"batches": X, **options})


def pruned(**options: Any) -> Callable[[fxprune.TracedModule], object]:
    given = {"macs": 0.5, "importance": "obs", "loader": X, **options}
    return lambda traced: fxprune.prune.channels(traced, **given)


def spent() -> Any:
    batches = (each for each in X.split(8))
    assert len([*batches]) == 5
    return batches


MISTAKES: dict[str, tuple[Callable[[fxprune.TracedModule], object], type[Exception], str]] = {
    "one sample": (measured(batches=X[:1]), ArgumentError, "1 samples; at least 2 are needed"),
    "no batch": (measured(batches=[]), ArgumentError, "0 samples; at least 2"),
    "a generator used twice": (measured(batches=spent()), ArgumentError, "can be gone through only once"),
    "labels": (measured(batches=[(X, X[:, 0])]), InputError, "Labels are no input"),
    "labels for obs": (pruned(loader=[(X, X[:, 0])]), InputError, "Labels are no input"),
    "NaN": (measured(batches=NAN), PruningError, r"`tanh` .*'2.weight' reads"),
    "NaN for obs": (pruned(loader=[X, NAN]), PruningError, "NaN or inf come up at `tanh`"),
    "NaN among what is held back": (
        measured(batches=X.index_fill(0, torch.tensor(1), float("nan"))), PruningError, "NaN or inf .* at `input_1`",
    ),
    "inf among what is held back": (
        measured(batches=X.index_fill(0, torch.tensor(1), float("inf"))), PruningError, "NaN or inf .* at `input_1`",
    ),
    "no row counts": (measured(weight=lambda x: x[:, 0] * 0), ArgumentError, "weight leaves no row"),
    "no row to fit counts": (
        measured(batches=X[:5], weight=lambda x: torch.tensor([0, 1, 0, 0, 0])), ArgumentError,
        "'2.weight' no row of the samples that are not held back",
    ),
    "a weight of other samples": (
        measured(weight=lambda x: torch.ones(3)), ArgumentError, r"shape \(3,\) for \d+ samples",
    ),
    "a weight of another form": (measured(weight=lambda x: 1), ArgumentError, "weight gave int"),
    "no loader": (pruned(loader=None), ArgumentError, "looks at data: give loader="),
    "a loss of labels": (pruned(loss=nn.CrossEntropyLoss(reduction="none")), ArgumentError, "loss gave a Tensor"),
    "a loss of one argument": (pruned(loss=lambda a: 0.0), ArgumentTypeError, r"loss takes \(a\)"),
    "a loss of three": (pruned(loss=lambda a, b, c: 0.0), ArgumentTypeError, r"loss takes \(a, b, c\)"),
    "a class of losses": (pruned(loss=nn.MSELoss), ArgumentTypeError, r"object of it: MSELoss\(\)"),
    "a loss that is a number": (pruned(loss=3), ArgumentError, "loss=3: one of auto"),
    "a distance of no name": (measured(distance="near"), ArgumentError, "distance='near': one of auto"),
    "a distance that is NaN": (measured(distance=lambda a, b: float("nan")), PruningError, "is NaN or inf"),
    "weight for what sees no data": (
        pruned(importance="l2", loader=None, weight=lambda x: x), ArgumentError, "weight would be ignored",
    ),
    "weight for taylor": (
        pruned(importance="taylor", loader=[(X, X[:, :4])], loss=functional.mse_loss, weight=lambda x: x),
        ArgumentError, 'weight would be ignored by "taylor"',
    ),
    "max_batches": (pruned(max_batches=0), ArgumentError, "max_batches=0: 1 or more"),
    "max_batches of another kind": (pruned(max_batches=1.5), ArgumentTypeError, "max_batches=1.5: an integer"),
    "shares": (measured(shares=(0.5, 1.0)), ArgumentError, "below 1"),
    "shares of another kind": (measured(shares="half"), ArgumentTypeError, "numbers from 0 to 1"),
    "max_samples": (measured(max_samples=0), ArgumentError, "max_samples=0"),
    "targets": (measured(targets="first"), fxprune.errors.NameLookupError, "'first' matches no parameter"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mistakes_are_named_and_change_nothing(mistake: str, captured: fxprune.TracedModule) -> None:
    call, error, message = MISTAKES[mistake]
    traced = copy.deepcopy(captured)
    before = {name: tensor.clone() for name, tensor in traced.state_dict().items()}
    state = torch.random.get_rng_state()
    with pytest.raises(error, match=message):
        call(traced)
    assert traced.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in traced.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_curves_of_another_module_and_of_groups_left_out_are_refused(captured: fxprune.TracedModule) -> None:
    other = trace(nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)))
    some = fxprune.sensitivity(captured, X, targets="0.weight")
    for traced, sensitivity in ((other, some), (copy.deepcopy(captured), some)):
        with pytest.raises(PruningError, match="has no curve of"):
            fxprune.prune.channels(traced, macs=0.5, importance=sensitivity)
        assert not list(traced.named_buffers())
    report = fxprune.prune.channels(other, 0.5, importance=fxprune.sensitivity(other, X), round_to=1)
    assert report.removed == {"0.weight (MLP unit)": (6, 12)}


def test_only_the_eval_graph_is_measured_whatever_the_mode() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 4))
    with pytest.raises(PruningError, match="needs the eval graph; captured: train"):
        fxprune.sensitivity(fxprune.trace(model.train(), (X[:2],), modes=("train",)), X)
    both = fxprune.trace(model, (X[:2],))
    expected = fxprune.sensitivity(both.eval(), X).curves[0].measured
    before = {name: tensor.clone() for name, tensor in both.state_dict().items()}
    assert fxprune.sensitivity(both.train(), X).curves[0].measured == expected
    assert both.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in both.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in both.parameters())


class Outputs(nn.Module):
    """A network that returns something else than logits."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.body, self.head = kind, network(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        logits = self.body(x)
        match self.kind:
            case "integers":
                return logits.argmax(-1)
            case "several":
                return logits, self.head(logits).softmax(-1), logits.argmax(-1)
            case "a dict":
                return {"logits": logits, "more": [self.head(logits).log_softmax(-1)]}
            case "masked":
                return logits.masked_fill(torch.tensor([False, True, False, False]), float("-inf"))
            case "masked log-probabilities":
                mask = torch.tensor([False, True, False, False])
                return logits.masked_fill(mask, float("-inf")).log_softmax(-1)
        raise AssertionError(self.kind)


def test_integers_alone_need_a_function() -> None:
    model = Outputs("integers")
    nn.init.zeros_(model.body[4].bias)
    traced = trace(model)
    with pytest.raises(PruningError, match="no floating-point tensor to compare. Give a function as distance"):
        fxprune.sensitivity(traced, X)
    sensitivity = fxprune.sensitivity(traced, X, distance=lambda own, dense: (own != dense).float().mean())
    assert 0 < max(loss for curve in sensitivity.curves for loss in curve.measured) <= 1


@pytest.mark.parametrize("kind", ["several", "a dict", "masked", "masked log-probabilities"])
def test_a_function_gets_what_the_module_returns_and_auto_compares_all_of_it(kind: str) -> None:
    traced = trace(Outputs(kind))
    seen = []

    def distance(own: Any, dense: Any) -> Tensor:
        seen.append(own)
        own, dense = (
            each["logits"] if kind == "a dict" else each[0] if kind == "several" else each for each in (own, dense)
        )
        return (own - dense)[:, 0].square().mean()

    curves = fxprune.sensitivity(traced, X, distance=distance).curves
    with torch.no_grad():
        expected = traced(X)
    assert type(seen[0]) is type(expected)
    for found in (curves, fxprune.sensitivity(traced, X).curves):
        assert all(0 < loss < 10 for curve in found for loss in curve.measured)


@pytest.mark.parametrize("x", [torch.ones(20, 6), torch.zeros(20, 6), X[:2], X[:, :1].expand(-1, 6)])
def test_constant_dead_and_few_inputs_are_right_results(x: Tensor, captured: fxprune.TracedModule) -> None:
    traced = copy.deepcopy(captured)
    report = fxprune.prune.channels(traced, macs=0.5, importance="obs", loader=x, round_to=1)
    assert report.macs[1] <= 0.5 * report.macs[0]
    if len(x.unique()) == 1:  # biases make up for what is constant
        assert all(loss < 1e-6 for curve in fxprune.sensitivity(captured, x).curves for loss in curve.measured)


class InPlace(nn.Module):
    """Operators that write into their operands, the input among these."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.first, self.second, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not self.in_place:
            y = functional.relu(self.first(x.relu()))
            return self.last((self.second(y) + y).relu())
        x.relu_()
        y = functional.relu_(self.first(x))
        z = self.second(y)
        z += y
        return self.last(z.relu_())


@pytest.mark.parametrize("options", [{}, {"dynamic_shapes": None}])
def test_operators_in_place_change_neither_results_nor_batches(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain, writing = InPlace(in_place=False), InPlace(in_place=True)
    writing.load_state_dict(plain.state_dict())
    batches = [each.clone() for each in X.split(2)]
    found = []
    for model in (plain, writing):
        traced = trace(model, **options)
        found.append([curve.measured for curve in fxprune.sensitivity(traced, batches).curves])
        fxprune.prune.channels(traced, 0.5, round_to=1)
        fxprune.reconstruct(traced, batches)
    assert torch.equal(torch.cat(batches), X)
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_and_frozen_parameters_give_the_same_order_of_groups(
    dtype: torch.dtype, captured: fxprune.TracedModule
) -> None:
    traced = trace(network().to(dtype).requires_grad_(False), X.to(dtype))
    plain, other = (fxprune.sensitivity(each, X.to(kind)) for each, kind in ((captured, X.dtype), (traced, dtype)))
    assert other.fragile() == plain.fragile()
    tolerance = 1e-3 if dtype == torch.float64 else 1.0
    for one, another in zip(plain.curves, other.curves, strict=True):
        assert another.losses() == pytest.approx(one.losses(), rel=tolerance)


def test_batches_beyond_max_batches_are_not_looked_at(captured: fxprune.TracedModule) -> None:
    masks = []
    for batches, most in (([X], None), ([X, NAN], 1), (X, 1)):
        traced = copy.deepcopy(captured)
        fxprune.prune.channels(traced, macs=0.5, importance="obs", loader=batches, max_batches=most)
        masks.append(dict(traced.named_buffers()))
    for other in masks[1:]:
        assert all(torch.equal(mask, other[name]) for name, mask in masks[0].items())
