"""The traced module itself: modes, names, code, copies, state dicts, conversions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fxprune
from fxprune.errors import CaptureError
from fxprune.graph.provenance import provenance_of
from fxprune.graph.spellings import respelled
from fxprune.graph.traced import Origin


class Keywords(nn.Module):
    """Children and a parameter that are called like Python's keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("class", nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"in": nn.Linear(3, 2)})))
        self.register_parameter("lambda", nn.Parameter(torch.tensor(0.5)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, last = getattr(self, "class")
        return last["in"](first(x)) * getattr(self, "lambda")


class Clashes(nn.Module):
    """Children that are called like what a container could know of its module."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Module()
        for name in ("options", "source_class", "parameter_order", "provenance", "reads"):
            self.layer.add_module(name, nn.Linear(2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layer.children():
            x = layer(x)
        return x


@pytest.fixture(scope="module")
def captured() -> fxprune.TracedModule:
    torch.manual_seed(0)
    return fxprune.trace(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)), (torch.randn(4, 3),))


@pytest.fixture
def traced(captured: fxprune.TracedModule) -> fxprune.TracedModule:
    return copy.deepcopy(captured)


def test_names_that_are_keywords_work_and_stay() -> None:
    model, x = Keywords(), torch.randn(4, 3)
    traced = fxprune.trace(model, (x,))
    assert traced.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(traced(x), model(x))
    assert 'getattr(getattr(getattr(self, "class"), "1"), "in").weight' in traced.code
    assert 'getattr(self, "lambda")' in traced.code
    targets = [node.target for node in traced.graph.find_nodes(op="get_attr")]
    assert "class.1.in.weight" in targets
    assert {type(target) for target in targets} == {str}  # as they were before code was generated
    assert torch.equal(copy.deepcopy(traced)(x), model(x))


def test_a_child_may_have_any_name() -> None:
    model, x = Clashes(), torch.randn(4, 2)
    traced = fxprune.trace(model, (x,))
    assert torch.equal(traced(x), model(x))
    fxprune.prune.l1_unstructured(traced, "layer.options.weight", amount=1)
    final = fxprune.finalize(traced)
    assert final.state_dict().keys() == model.state_dict().keys()
    assert provenance_of(final.get_submodule("layer.options")).source_class is nn.Linear


def test_the_eval_graph_comes_first_in_whatever_order_modes_were_asked_for() -> None:
    for modes in (("train", "eval"), ("eval", "train")):
        traced = fxprune.trace(nn.Linear(2, 2), (torch.randn(3, 2),), modes=modes)
        assert traced.modes == tuple(traced.graphs) == ("eval", "train")


def test_a_mode_that_is_dropped_cannot_be_selected(traced: fxprune.TracedModule) -> None:
    traced.train()
    traced.keep_modes("eval")
    assert traced.modes == ("eval",)
    assert not traced.training
    x = torch.randn(5, 3)
    assert torch.equal(traced(x), traced(x))
    with pytest.raises(CaptureError, match="train mode was asked for; captured: eval"):
        traced.train()
    copied = copy.deepcopy(traced)
    assert copied.modes == ("eval",)


def test_what_describes_a_module_is_not_overwritten_by_accident(traced: fxprune.TracedModule) -> None:
    for name in ("plan", "origin", "decided", "decided_by", "example_args", "example_kwargs", "modes", "input_check"):
        with pytest.raises(AttributeError):
            setattr(traced, name, None)


def test_finalize_says_what_it_made_the_module_from(traced: fxprune.TracedModule) -> None:
    assert traced.origin is None
    fxprune.prune.ln_structured(traced, "0.weight", amount=1, n=2, dim=0)
    final = fxprune.finalize(traced)
    assert isinstance(final.origin, Origin)
    assert final.origin.sources["0.weight"]() is traced.get_parameter("0.weight_orig")
    assert copy.deepcopy(final).origin is final.origin


def test_sample_inputs_are_replaced_and_checked_anew(traced: fxprune.TracedModule) -> None:
    wide = traced.double()
    assert wide.example_args[0].dtype == torch.float64
    assert wide(torch.randn(2, 3).double()).dtype == torch.float64
    with pytest.raises(fxprune.errors.InputError, match="captured was torch.float64"):
        wide(torch.randn(2, 3))


def test_the_example_run_leaves_no_trace(traced: fxprune.TracedModule) -> None:
    traced.eval()
    state = copy.deepcopy(traced.state_dict())
    generator = torch.get_rng_state()
    first, second = traced.run_example("train"), traced.run_example("train")
    assert torch.equal(first[0], second[0])  # the same draws
    assert not traced.training
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, state[name]) for name, value in traced.state_dict().items())


@pytest.mark.parametrize("into", ["parametrized", "hooked"])
def test_state_of_norms_loads_from_either_spelling(into: str) -> None:
    def hooked() -> nn.Module:
        return nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(3, 2)), torch.nn.utils.spectral_norm(nn.Linear(2, 2)))

    def parametrized() -> nn.Module:
        second = parametrizations.spectral_norm(nn.Linear(2, 2))
        return nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2)), second)

    models = {"hooked": hooked(), "parametrized": parametrized()}
    target, source = models.pop(into), models.popitem()[1]
    x = torch.randn(4, 3)
    for model in (source, target):
        model.eval()(x)  # hooks compute what is read after this
    traced = fxprune.trace(target, (x,)).eval()
    state = source.state_dict()
    traced.load_state_dict(state)
    assert torch.allclose(traced(x), source(x), atol=1e-6)
    assert not torch.allclose(traced(x), nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))(x), atol=1e-6)


def test_keys_are_respelled_only_where_something_is_missing() -> None:
    own = ["a.parametrizations.weight.original0", "a.parametrizations.weight.original1", "b.weight_g"]
    state = {"a.weight_g": 1, "a.weight_v": 2, "b.weight_g": 3, "c.weight_g": 4}
    assert respelled(state, own) == {own[0]: 1, own[1]: 2, "b.weight_g": 3, "c.weight_g": 4}
    assert respelled(state, state.keys()) == state
