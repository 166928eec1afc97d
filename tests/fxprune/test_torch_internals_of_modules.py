"""What is private of torch's modules, pruning methods and optimizers still behaves as the library relies on."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.nn.utils import parametrizations, prune

from fxprune import torch_internals as internals

# ---- modules


def test_ConvNd_and_ConvTransposeNd_are_the_bases_of_convolutions() -> None:
    for dimensions in (1, 2, 3):
        plain = getattr(nn, f"Conv{dimensions}d")(2, 4, 1)
        transposed = getattr(nn, f"ConvTranspose{dimensions}d")(2, 4, 1)
        assert isinstance(plain, internals.ConvNd)
        assert not isinstance(plain, internals.ConvTransposeNd)
        assert isinstance(transposed, internals.ConvNd)
        assert isinstance(transposed, internals.ConvTransposeNd)
        assert (plain.transposed, transposed.transposed) == (False, True)


def test_ConvTransposeNd_has_its_inputs_first() -> None:
    assert nn.ConvTranspose2d(2, 4, 1).weight.shape[:2] == (2, 4)


def test_NormBase_is_the_base_of_norms_with_running_statistics() -> None:
    for norm in (nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.SyncBatchNorm(2), nn.InstanceNorm2d(2)):
        assert isinstance(norm, internals.NormBase)
        assert norm.num_features == 2
    assert not isinstance(nn.LayerNorm(2), internals.NormBase)


def test_Orthogonal_is_what_torchs_parametrization_registers() -> None:
    layer = parametrizations.orthogonal(nn.Linear(3, 3))
    assert isinstance(layer.parametrizations.weight[0], internals.Orthogonal)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_flat_weight_names_are_all_weights_in_the_kernels_order(kind: type[nn.RNNBase]) -> None:
    layer = kind(2, 3, num_layers=2)
    assert internals.flat_weight_names(layer) == [name for name, _ in layer.named_parameters()]
    assert internals.flat_weight_names(nn.Linear(2, 2)) == []


def test_weights_gathered_if_is_asked_at_each_forward_and_no_more_afterwards() -> None:
    layer, asked = nn.LSTM(2, 3), []
    attributes = dict(vars(layer))
    with internals.weights_gathered_if(layer, lambda: not asked.append(1)):
        layer(torch.ones(1, 1, 2))
        layer(torch.ones(1, 1, 2))
    assert len(asked) == 2
    layer(torch.ones(1, 1, 2))
    assert len(asked) == 2
    assert vars(layer).keys() == attributes.keys()


def test_has_forward_is_false_for_containers_without_one() -> None:
    class Own(nn.Module):
        def forward(self) -> None: ...

    assert internals.has_forward(nn.Linear(2, 2))
    assert internals.has_forward(Own())
    assert not internals.has_forward(nn.ModuleList())
    assert not internals.has_forward(nn.Module())


# the profiler of some versions of torch says what it keeps
@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")
@pytest.mark.parametrize(("heads", "kdim", "fused"), [(2, None, True), (1, None, False), (2, 6, False)])
def test_fuses_in_eval_says_when_eager_takes_the_fused_kernel(heads: int, kdim: int | None, fused: bool) -> None:
    attention = nn.MultiheadAttention(4, heads, kdim=kdim, batch_first=True).eval()
    query, key = torch.randn(1, 3, 4), torch.randn(1, 3, kdim or 4)
    value = query if kdim is None else torch.randn(1, 3, 4)
    with torch.no_grad(), torch.profiler.profile() as profile:
        attention(query, query if kdim is None else key, value)
    kernels = {event.key for event in profile.key_averages()}
    assert ("aten::_native_multi_head_attention" in kernels) is internals.fuses_in_eval(attention) is fused


def test_register_named_tuple_gives_a_class_a_name_in_stored_specifications() -> None:
    class Found(NamedTuple):
        value: int

    for _ in range(2):  # a second time changes nothing
        internals.register_named_tuple(Found)
    structure = pytree.tree_structure(Found(1))
    assert pytree.treespec_loads(pytree.treespec_dumps(structure)) == structure
    assert f"{__name__}." in pytree.treespec_dumps(structure)


def test_WeightNormParametrization() -> None:
    layer = parametrizations.weight_norm(nn.Linear(3, 2), dim=1)
    (step,) = layer.parametrizations["weight"]
    assert isinstance(step, internals.WeightNormParametrization)
    assert step.dim == 1


# ---- pruning methods


def test_pruned_tensor_is_set_by_apply() -> None:
    layer = nn.Linear(2, 2)
    prune.l1_unstructured(layer, "weight", amount=1)
    (hook,) = layer._forward_pre_hooks.values()
    assert internals.pruned_tensor(hook) == "weight"  # type: ignore[arg-type]


def test_name_pruning_method_lets_it_join_a_container() -> None:
    method, container = prune.L1Unstructured(1), prune.PruningContainer()
    for each in (method, container):
        internals.name_pruning_method(each, "weight")
    container.add_pruning_method(method)
    mask = container.compute_mask(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 1.0]))
    assert mask.tolist() == [0, 0, 1]


def test_pruning_methods_are_those_of_a_container_in_order() -> None:
    layer = nn.Linear(2, 2)
    prune.l1_unstructured(layer, "weight", amount=1)
    prune.random_unstructured(layer, "weight", amount=1)
    (container,) = layer._forward_pre_hooks.values()
    kinds = [type(method) for method in internals.pruning_methods(container)]  # type: ignore[arg-type]
    assert kinds == [prune.L1Unstructured, prune.RandomUnstructured]
    single = prune.Identity()
    assert internals.pruning_methods(single) == (single,)


@pytest.mark.parametrize(("amount", "error"), [("half", TypeError), (1.5, ValueError), (-1, ValueError)])
def test_validate_pruning_amount_refuses_what_is_no_amount(amount: object, error: type[Exception]) -> None:
    internals.validate_pruning_amount(0.5)
    internals.validate_pruning_amount(3)
    with pytest.raises(error):
        internals.validate_pruning_amount(amount)


# ---- optimizers


def test_step_pre_hooks_are_those_that_were_registered() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    assert internals.step_pre_hooks(optimizer) == {}
    handle = optimizer.register_step_pre_hook(print)
    assert internals.step_pre_hooks(optimizer) == {handle.id: print}
    assert internals.step_pre_hooks(object()) is None


class StepsTwice(torch.optim.SGD):
    def step(self, closure: object = None) -> None:
        if closure is not None:
            raise ZeroDivisionError
        super().step()


def test_is_inside_step_of_the_same_optimizer_alone() -> None:
    found: list[bool] = []
    parameter = nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    torch.optim.SGD([parameter])  # torch adds the hooks to a class at its first instance
    inner, outer = StepsTwice([parameter]), torch.optim.SGD([parameter])
    inner.register_step_pre_hook(lambda optimizer, args, kwargs: found.append(internals.is_inside_step(optimizer)))
    inner.step()
    assert found == [False, True]
    with pytest.raises(ZeroDivisionError):
        inner.step(print)
    outer.register_step_pre_hook(lambda *_: inner.step())
    outer.step()
    assert found == [False, True, False, False, True]
