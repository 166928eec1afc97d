"""The view of a masked parameter, against what `torch.nn.utils.prune` stores."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from fxprune.graph.masks import mask_name, masked, masked_views, named_by_mask, named_by_original, original_name, view
from fxprune.graph.names import tensors_of
from fxprune.graph.reparametrizations import computed_names, remove_state, reparametrized


@pytest.fixture
def pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    prune.l1_unstructured(model[0], "weight", amount=2)
    return model


def test_names_are_converted_both_ways() -> None:
    assert named_by_original(original_name("a.weight")) == named_by_mask(mask_name("a.weight")) == "a.weight"
    assert named_by_original("a.weight") is named_by_mask("a.weight_orig") is None


def test_the_view_is_what_torch_stores(pruned: nn.Module) -> None:
    found = view(pruned, "0.weight")
    assert found.original is pruned[0].weight_orig
    assert found.mask is pruned[0].weight_mask
    assert tensors_of(pruned)[found.original_name] is found.original
    assert tensors_of(pruned)[found.mask_name] is found.mask
    assert torch.equal(found.value(), pruned[0].weight)
    assert not found.value().requires_grad
    plain = view(pruned, "2.weight")
    assert plain.mask is None
    assert plain.original is pruned[2].weight
    assert plain.original_name == "2.weight"
    assert torch.equal(plain.value(), pruned[2].weight)
    assert masked(pruned) == [v.name for v in masked_views(pruned)] == ["0.weight"]


def test_a_masked_parameter_has_no_view_of_its_parts(pruned: nn.Module) -> None:
    assert view(pruned, "0.gain").original is None
    with pytest.raises(AttributeError):
        view(pruned, "9.weight")


def test_inserting_a_mask_stores_what_torch_stores(pruned: nn.Module) -> None:
    mask = torch.tensor([[True, False], [False, True]])
    reference = nn.Linear(2, 2)
    reference.load_state_dict(pruned[2].state_dict())
    prune.custom_from_mask(reference, "weight", mask)
    weight = pruned[2].weight
    view(pruned, "2.weight").insert_mask(mask)
    assert view(pruned, "2.weight").original is weight
    assert pruned[2].state_dict().keys() == reference.state_dict().keys()
    assert all(torch.equal(pruned[2].state_dict()[n], v) for n, v in reference.state_dict().items())
    assert pruned[2].weight_mask.dtype == torch.float32
    assert masked(pruned) == ["0.weight", "2.weight"]


def test_replacing_a_mask_says_whether_it_differs(pruned: nn.Module) -> None:
    before = pruned[0].weight_mask
    assert not view(pruned, "0.weight").replace_mask(before.bool())
    assert view(pruned, "0.weight").replace_mask(torch.zeros(2, 3))
    assert before.any()  # whoever holds the old one keeps it
    assert not pruned[0].weight_mask.any()


def test_a_buffer_that_is_called_like_a_mask_is_none() -> None:
    layer = nn.Linear(2, 2)
    layer.register_buffer("weight_mask", torch.zeros(2, 2))
    model = nn.Sequential(layer)
    assert masked(model) == []
    assert view(model, "0.weight").mask is None
    assert view(model, "0.weight").original is layer.weight


def test_a_mask_on_a_parametrized_original_is_told_apart() -> None:
    layer = nn.Linear(2, 2)
    prune.identity(layer, "weight")
    parametrizations.weight_norm(layer, "weight_orig")
    found = view(nn.Sequential(layer), "0.weight")
    assert found.mask is layer.weight_mask
    assert found.original is None
    assert found.original_is_computed
    assert masked(nn.Sequential(layer)) == ["0.weight"]


def test_a_mask_beside_a_norm_is_one_where_it_was_inserted() -> None:
    for norm, stored in (
        (parametrizations.weight_norm, ["weight_mask"]),
        (parametrizations.spectral_norm, ["weight_mask"]),
        (weight_norm, ["weight_mask"]),
        (spectral_norm, ["weight_u", "weight_v", "weight_mask"]),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, on legacy norms
            model = nn.Sequential(norm(nn.Linear(3, 2)))
        bare = view(model, "0.weight")
        assert (bare.original, bare.mask, bare.original_is_computed) == (None, None, True)
        mask = torch.tensor([[1.0, 0, 1], [0, 1, 1]])
        model[0].register_buffer("weight_mask", mask)
        assert masked(model) == []  # a buffer of the model's own
        del model[0].weight_mask
        bare.insert_mask(mask)
        found = view(model, "0.weight")
        assert list(model[0]._buffers) == stored
        assert torch.equal(found.mask, mask)  # type: ignore[arg-type]
        assert (found.original, found.original_is_computed, found.shape) == (None, True, mask.shape)
        assert masked(model) == reparametrized(model) == computed_names(model) == ["0.weight"]
        assert found.replace_mask(torch.ones(2, 3))
        remove_state(model, "0.weight")
        assert masked(model) == reparametrized(model) == []
        assert list(model.state_dict()) == ["0.bias"]


def test_a_plain_parameter_beside_buffers_like_those_of_a_norm_is_plain() -> None:
    layer = nn.Linear(3, 2)
    layer.register_buffer("weight_u", torch.zeros(2))
    layer.register_buffer("weight_v", torch.zeros(3))
    model = nn.Sequential(layer)
    assert not view(model, "0.weight").original_is_computed
    assert reparametrized(model) == []


def test_a_write_after_the_mask_was_inserted_shows(pruned: nn.Module) -> None:
    view(pruned, "2.weight").insert_mask(torch.ones(2, 2))
    assert not view(pruned, "2.weight").changed_since_masked
    assert not view(pruned, "0.weight").changed_since_masked  # torch inserted this one: not known
    view(pruned, "2.weight").replace_mask(torch.eye(2))
    assert not view(pruned, "2.weight").changed_since_masked
    with torch.no_grad():
        pruned[2].weight_orig.mul_(2)
    assert view(pruned, "2.weight").changed_since_masked
    assert not view(pruned, "2.bias").changed_since_masked
