"""State dicts bring their masks into a module that has none, also from around it; parameters keep their order."""

from __future__ import annotations

import copy

import pytest
import safetensors.torch
import torch
from torch import nn

import fxprune
from fxprune.callbacks import masks_from_states
from fxprune.callbacks.states import states_that_share_nothing
from fxprune.errors import ArgumentTypeError, StateDictError
from tests.training_runs import assert_same_state, examples, traced_network

images, _ = examples(4)


class Holder(nn.Module):
    """A traced module within another, as in a LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale = traced_network(), nn.Parameter(torch.ones(()))


def masked_holder() -> Holder:
    holder = Holder()
    fxprune.prune.l1_unstructured(holder.net, "3.*", amount=0.5)
    return holder


@pytest.mark.parametrize("strict", [True, False])
def test_a_module_around_it_loads_masks(strict: bool) -> None:
    wanted, found = masked_holder(), Holder()
    names = [name for name, _ in found.named_parameters()]
    values = [*found.parameters()]
    masks_from_states(found.net)
    result = found.load_state_dict(wanted.state_dict(), strict=strict)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same_state(found, wanted)
    assert torch.equal(found.net.eval()(images), wanted.net.eval()(images))
    assert [name.removesuffix("_orig") for name, _ in found.named_parameters()] == names
    assert all(now is before for now, before in zip(found.parameters(), values, strict=True))


@pytest.mark.parametrize("strict", [True, False])
def test_the_module_itself_loads_masks(strict: bool) -> None:
    wanted, found = masked_holder().net, masks_from_states(traced_network())
    found.load_state_dict(wanted.state_dict(), strict=strict)
    assert_same_state(found, wanted)


def test_a_state_without_masks_is_that_of_masks_of_ones() -> None:
    wanted, found = Holder(), masked_holder()
    masks_from_states(found.net)
    found.load_state_dict(wanted.state_dict())
    assert bool((found.net.get_buffer("3.weight_mask") == 1).all())
    assert torch.equal(found.net.eval()(images), wanted.net.eval()(images))


def test_a_state_of_other_parameters_leaves_masks_as_they_are() -> None:
    found = masks_from_states(masked_holder().net)
    before = found.get_buffer("3.weight_mask").clone()
    found.load_state_dict({"8.bias": torch.zeros(4)}, strict=False)
    assert torch.equal(found.get_buffer("3.weight_mask"), before)


def test_masks_of_what_a_norm_computes_come_along() -> None:
    wanted, found = traced_network(), traced_network()
    for traced in (wanted, found):
        fxprune.weight_norm(traced, "3.weight")
    fxprune.prune.l1_unstructured(wanted, "3.weight", amount=0.5)
    dense = copy.deepcopy(found)
    masks_from_states(found).load_state_dict(wanted.state_dict())
    assert_same_state(found, wanted)
    assert torch.equal(found.eval()(images), wanted.eval()(images))
    found.load_state_dict(dense.state_dict())
    assert torch.equal(found.eval()(images), dense.eval()(images))


class Tied(nn.Module):
    """A layer that reads what another embeds by."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embed, self.hidden, self.head = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6)
        self.head.weight = self.embed.weight

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(self.embed(indices)).relu())


@pytest.mark.parametrize("masked", ["embed.weight", "*.weight"])
@pytest.mark.parametrize("lacking", [None, "embed", "head"])
def test_a_parameter_of_two_names_is_loaded_also_from_a_file_that_has_one_of_them(
    lacking: str | None, masked: str
) -> None:
    indices = torch.randint(6, (3, 5))
    wanted, found = fxprune.trace(Tied(), indices), masks_from_states(fxprune.trace(Tied(), indices))
    fxprune.prune.l1_unstructured(wanted, masked, amount=0.5)
    gone = {f"{lacking}.weight", f"{lacking}.weight_orig"}
    state = {name: value for name, value in wanted.state_dict().items() if name not in gone}
    for _ in range(2):  # the second time into masks that are there
        found.load_state_dict(state, strict=False)
        assert torch.equal(found(indices), wanted(indices))
    assert_same_state(found, wanted)


def test_states_for_safetensors_share_nothing_and_the_module_keeps_its_ties() -> None:
    indices = torch.randint(6, (3, 5))
    traced = fxprune.trace(Tied(), indices)
    traced.get_parameter("hidden.weight").data = traced.get_parameter("hidden.weight").data.t().contiguous().t()
    fxprune.prune.l1_unstructured(traced, "embed.weight", amount=0.5)
    before = {name: value.clone() for name, value in traced.state_dict().items()}
    states_that_share_nothing(traced)
    holder = nn.ModuleDict({"net": traced})
    state = safetensors.torch.load(safetensors.torch.save(holder.state_dict()))
    assert state.keys() == {f"net.{name}" for name in before}
    assert all(torch.equal(state[f"net.{name}"], value) for name, value in before.items())
    kept = traced.state_dict(keep_vars=True)
    assert len({id(value) for value in kept.values()}) < len(kept)
    assert fxprune.finalize(traced).get_parameter("head.weight") is not None


def test_a_state_that_does_not_fit_leaves_the_module_without_masks() -> None:
    found = masks_from_states(traced_network())
    state = masked_holder().net.state_dict()
    state["3.weight_mask"] = torch.ones(3, 3)
    with pytest.raises(StateDictError, match="size mismatch"):
        found.load_state_dict(state)
    del state["3.weight_mask"]
    with pytest.raises(StateDictError):
        found.load_state_dict(state)
    assert not fxprune.prune.is_pruned(found)


def test_copies_and_results_take_no_masks_and_what_is_no_traced_module_is_refused() -> None:
    found = masks_from_states(traced_network())
    state = masked_holder().net.state_dict()
    for other in (copy.deepcopy(found), fxprune.finalize(found)):
        with pytest.raises(StateDictError):
            other.load_state_dict(state)
    with pytest.raises(ArgumentTypeError):
        masks_from_states(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_forward_that_was_wrapped_once_runs_the_graph_of_the_moment() -> None:
    """As accelerate does for mixed precision: it keeps the function, not the module's attribute."""
    traced = traced_network()
    function = traced.forward.__func__  # type: ignore[attr-defined]
    traced.forward = lambda *args: function(traced, *args)  # type: ignore[method-assign]
    fxprune.prune.l1_unstructured(traced, "3.weight", amount=0.5)
    wanted = copy.deepcopy(traced)
    assert torch.equal(traced.eval()(images), wanted.eval()(images))
    assert torch.equal(traced.train()(images), wanted.train()(images))
