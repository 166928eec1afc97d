"""State dicts with masks and norms go into traced modules that have none, as their keys say."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fxprune
from fxprune.errors import ArgumentTypeError, StateDictError


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 5, 2), nn.Flatten(), nn.Linear(45, 6))


X = torch.randn(2, 3, 4, 4)


def masked(model: nn.Module) -> nn.Module:
    prune.l1_unstructured(model[0], "weight", amount=0.4)
    prune.random_unstructured(model[0], "bias", amount=0.5)
    prune.ln_structured(model[4], "weight", amount=2, n=2, dim=0)
    return model


def legacy_weight_norms(model: nn.Module) -> nn.Module:
    nn.utils.weight_norm(model[0], dim=1)
    nn.utils.weight_norm(model[2], dim=None)
    nn.utils.weight_norm(model[4])
    return model


def weight_norms(model: nn.Module) -> nn.Module:
    parametrizations.weight_norm(model[0])
    parametrizations.weight_norm(model[4], dim=1)
    prune.l1_unstructured(model[2], "weight", amount=0.4)
    return model


def legacy_spectral_norms(model: nn.Module) -> nn.Module:
    for layer in (model[0], model[2], model[4]):
        nn.utils.spectral_norm(layer)
    return model


def spectral_norms(model: nn.Module) -> nn.Module:
    for layer in (model[0], model[2], model[4]):
        parametrizations.spectral_norm(layer)
    return model


ALL = [masked, legacy_weight_norms, weight_norms, legacy_spectral_norms, spectral_norms]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("change", ALL, ids=lambda change: change.__name__)
def test_a_state_of_eager_goes_into_a_module_traced_without_masks_and_norms(
    change: Callable[[nn.Module], nn.Module],
) -> None:
    eager = change(network())
    eager.train()(X)  # spectral norms move
    eager.eval()
    traced = fxprune.trace(network().eval(), X)
    bias = traced.get_parameter("0.bias")
    assert fxprune.load_state(traced, eager.state_dict()) is traced
    assert torch.equal(traced(X), eager(X))
    assert dict(traced.named_parameters()).get("0.bias_orig", bias) is bias
    again = copy.deepcopy(traced)
    traced.load_state_dict(eager.state_dict())  # its keys are the module's now
    assert torch.equal(again(X), traced(X))
    if change is not legacy_spectral_norms:  # whose power iteration takes its two steps in the other order
        for module in (traced, eager):
            module.train()(X).square().mean().backward()
        assert torch.equal(traced(X), eager(X))
    final = fxprune.finalize(traced.eval())
    torch.testing.assert_close(final(X), eager.eval()(X))


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("norm", [fxprune.weight_norm, fxprune.spectral_norm])
def test_a_state_of_a_traced_module_goes_into_another_one(norm: Callable[..., object], inner: bool) -> None:
    source = fxprune.trace(network().eval(), X)
    norm(source, "4.weight")
    stored = "original1" if norm is fxprune.weight_norm else "original"
    name = f"4.parametrizations.weight.{stored}" if inner else "4.weight"
    fxprune.prune.l1_unstructured(source, name, amount=0.3)
    fxprune.prune.l1_unstructured(source, "0.weight", amount=0.3)
    state = source.state_dict()
    traced = fxprune.load_state(fxprune.trace(network().eval(), X), state)
    assert traced.state_dict().keys() == state.keys()
    assert torch.equal(traced(X), source(X))
    half = fxprune.trace(network().eval(), X)
    fxprune.prune.identity(half, "0.weight")  # some of it is there already
    norm(half, "4.weight")
    fxprune.load_state(half, state)
    assert torch.equal(half(X), source(X))


def test_names_that_do_not_fit_are_named_and_nothing_changes() -> None:
    state = masked(network()).state_dict()
    traced = fxprune.trace(network().eval(), X)
    before = {name: value.clone() for name, value in traced.state_dict().items()}
    broken = {
        r"Missing key\(s\): 4.bias": {k: v for k, v in state.items() if k != "4.bias"},
        r"Missing key\(s\): 0.weight_orig": {k: v for k, v in state.items() if k != "0.weight_orig"},
        r"Unexpected key\(s\): 9.weight_mask": state | {"9.weight_mask": torch.ones(2)},
        r"size mismatch: 0.weight_mask \[1\] for \[4, 3, 3, 3\]": state | {"0.weight_mask": torch.ones(1)},
    }
    for message, wrong in broken.items():
        with pytest.raises(StateDictError, match=message):
            fxprune.load_state(traced, wrong)
    other = network()
    parametrizations.orthogonal(other[4])
    with pytest.raises(StateDictError, match=r"parametrizations of 4.weight .* Build the model with them"):
        fxprune.load_state(traced, other.state_dict())
    with pytest.raises(StateDictError, match="Missing key.*has no masks, and the module has some"):
        fxprune.load_state(fxprune.load_state(fxprune.trace(network().eval(), X), state), network().state_dict())
    with pytest.raises(ArgumentTypeError, match="load_state_dict takes a mapping"):
        fxprune.load_state(traced, "masked.pt")  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="traced"):
        fxprune.load_state(network(), state)  # type: ignore[arg-type]
    assert traced.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in traced.state_dict().items())


def test_parts_of_a_state_are_loaded_where_that_is_asked_for() -> None:
    eager = masked(network()).eval()
    state = {name: value for name, value in eager.state_dict().items() if name.startswith("0.")} | {"x": torch.ones(1)}
    traced = fxprune.load_state(fxprune.trace(network().eval(), X), state, strict=False)
    assert fxprune.prune.is_pruned(traced)
    assert torch.equal(traced.get_buffer("0.weight_mask"), eager[0].weight_mask)


def test_the_error_of_load_state_dict_says_which_function_inserts() -> None:
    traced = fxprune.trace(network().eval(), X)
    for change in (masked, spectral_norms):
        with pytest.raises(StateDictError, match=r"fxprune.load_state\(traced, state\) inserts them"):
            traced.load_state_dict(change(network()).state_dict())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


@pytest.mark.parametrize("change", [lambda m: prune.l1_unstructured(m, "weight", 0.5), parametrizations.weight_norm])
def test_a_layer_that_stands_in_two_places_gets_its_mask_or_norm_once(change: Callable[[nn.Module], object]) -> None:
    eager = Tied().eval()
    change(eager.first)
    x = torch.randn(3, 4)
    traced = fxprune.load_state(fxprune.trace(Tied().eval(), x), eager.state_dict())
    assert torch.equal(traced(x), eager(x))
    assert {name.partition(".")[0] for name in eager.state_dict()} == {"first", "second"}


class _Scaled(nn.Module):
    """Keeps a number beside its tensors, which its state has, too."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.weight, self.factor = nn.Parameter(torch.randn(3, 3)), factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight * self.factor

    def get_extra_state(self) -> dict[str, float]:
        return {"factor": self.factor}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.factor = state["factor"]


def test_what_a_module_keeps_beside_its_tensors_is_refused_with_what_to_do() -> None:
    traced = fxprune.trace(nn.Sequential(_Scaled(2.0)), torch.randn(2, 3))
    other, x = nn.Sequential(_Scaled(2.0)), torch.randn(4, 3)
    before, state = traced(x), other.state_dict()
    with pytest.raises(StateDictError, match=r"Unexpected key\(s\): 0._extra_state. .* leave it out"):
        traced.load_state_dict(state)
    assert torch.equal(traced(x), before)
    traced.load_state_dict({name: value for name, value in state.items() if not name.endswith("_extra_state")})
    assert torch.equal(traced(x), other(x))
