"""Masks on what norms compute: files, state dicts, and the eager spelling of them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fxprune
from fxprune import prune
from fxprune.graph.masks import masked
from tests.masked_norms import INSERTED, SYSTEMS, add_mask, normed, twins
from tests.systems import MIXED, X, assert_same, call, mlp


@pytest.mark.parametrize("system", SYSTEMS)
def test_masks_on_carried_systems_are_saved_and_loaded(system: str, tmp_path: Path) -> None:
    traced, _, args, name = twins("linear", system)
    call(traced, "train", args)
    fxprune.save(traced, tmp_path / "a.fxp")
    model = normed(mlp, SYSTEMS[system], name)
    for loaded in (fxprune.load(tmp_path / "a.fxp"), fxprune.load(tmp_path / "a.fxp", model)):
        assert masked(loaded) == [name]
        assert list(loaded.state_dict()) == list(traced.state_dict())
        other = copy.deepcopy(traced)
        for mode in MIXED:
            assert_same(call(loaded, mode, args)[0], call(other, mode, args)[0], mode)
        prune.l1_unstructured(loaded, name, 3)
        assert list(fxprune.finalize(loaded).state_dict()) == list(mlp().state_dict())


@pytest.mark.parametrize("system", INSERTED)
def test_masks_on_inserted_norms_are_saved_and_loaded(system: str, tmp_path: Path) -> None:
    traced, _, args, name = twins("linear", system, INSERTED[system])
    fxprune.save(traced, tmp_path / "a.fxp")
    for model in (None, mlp(), normed(mlp, SYSTEMS[system], name)):
        loaded = fxprune.load(tmp_path / "a.fxp", model)
        assert masked(loaded) == [name]
        assert_same(call(loaded, "train", args)[0], call(copy.deepcopy(traced), "train", args)[0], "train")


def test_masks_below_a_norm_and_above_it_are_saved_and_loaded(tmp_path: Path) -> None:
    traced = fxprune.weight_norm(fxprune.trace(mlp(), X), "0.weight")
    prune.l1_unstructured(traced, "0.parametrizations.weight.original1", 0.3)
    prune.ln_structured(traced, "0.weight", 2, n=2, dim=0)
    fxprune.save(traced, tmp_path / "a.fxp")
    for model in (None, mlp()):
        loaded = fxprune.load(tmp_path / "a.fxp", model)
        assert set(masked(loaded)) == set(masked(traced))
        assert_same(call(loaded, "train", X)[0], call(traced, "train", X)[0], "train")


def test_a_mask_takes_the_place_of_a_norm_that_the_file_has_not(tmp_path: Path) -> None:
    plain = prune.l1_unstructured(fxprune.trace(mlp(), X), "0.weight", 0.5)
    fxprune.save(plain, tmp_path / "a.fxp")
    loaded = fxprune.load(tmp_path / "a.fxp", normed(mlp, parametrizations.weight_norm, "0.weight"))
    assert list(loaded.state_dict()) == list(plain.state_dict())
    assert_same(call(loaded, "train", X)[0], call(plain, "train", X)[0], "train")


@pytest.mark.parametrize("system", ["weight norm", "spectral norm"])
def test_state_goes_to_an_eager_model_with_the_mask_as_a_parametrization(system: str) -> None:
    traced, _, args, name = twins("linear", system)
    call(traced, "train", args)
    eager = normed(mlp, SYSTEMS[system], name).eval()
    add_mask(eager[0], "weight", torch.ones(8, 6))
    place = "parametrizations.weight.1.mask"
    eager.load_state_dict({key.replace("weight_mask", place): value for key, value in traced.state_dict().items()})
    assert_same(call(eager, "train", args)[0], call(traced, "train", args)[0], "train")
    again = fxprune.trace(eager, args)
    assert_same(call(again, "eval", args)[0], call(traced, "eval", args)[0], "traced again")
    weights = [fxprune.finalize(module, shrink=False).get_parameter(name) for module in (again, traced)]
    assert_same(*weights, "finalized")


def test_states_of_masked_legacy_and_current_norms_load_into_each_other() -> None:
    legacy, _, args, _ = twins("linear", "legacy weight norm")
    current, *_ = twins("linear", "weight norm")
    call(legacy, "train", args)[0].square().mean().backward()
    torch.optim.SGD(legacy.parameters(), lr=0.5).step()
    current.load_state_dict(legacy.state_dict())
    assert_same(call(current, "eval", args)[0], call(legacy, "eval", args)[0], "current")
    with torch.no_grad():
        current.get_parameter("0.parametrizations.weight.original0").mul_(2)
    legacy.load_state_dict(current.state_dict())
    assert_same(call(legacy, "eval", args)[0], call(current, "eval", args)[0], "legacy")


def test_written_back_layers_are_plain_and_have_the_masked_values() -> None:
    for system in ("weight norm", "legacy spectral norm"):
        traced, _, args, name = twins("linear", system)
        model = normed(mlp, SYSTEMS[system], name)
        written = fxprune.write_back(fxprune.finalize(traced), model)
        assert type(written[0]) is nn.Linear
        assert not written[0]._forward_pre_hooks
        torch.testing.assert_close(call(written, "eval", args)[0], call(traced, "eval", args)[0])
