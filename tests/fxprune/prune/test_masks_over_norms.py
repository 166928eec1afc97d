"""Masks on what norms and parametrizations compute, beside eager layers that multiply their weight by the mask."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

import fxprune
from fxprune import TracedModule, prune
from fxprune.errors import FxpruneWarning, NameLookupError, PruningError
from fxprune.graph.masks import masked
from fxprune.graph.reparametrizations import reparametrized
from tests.masked_norms import INSERTED, SYSTEMS, add_mask, half_of, normed, twins, view_of
from tests.systems import MIXED, Optimizer, X, adam, assert_same, call, mlp, sgd


def assert_same_as_eager(
    traced: TracedModule,
    eager: nn.Module,
    args: tuple[Any, ...],
    name: str,
    optimizers_of: tuple[Optimizer, ...] = (sgd, adam),
) -> None:
    """Outputs, gradients, parameters and buffers over calls and clipped training steps; then what it folds to."""

    def compare(what: str) -> None:
        parameters = dict(eager.named_parameters())
        assert parameters.keys() == dict(traced.named_parameters()).keys(), what
        for key, parameter in traced.named_parameters():
            assert_same(parameter, parameters[key], f"{what}: {key}")
            assert (parameter.grad is None) == (parameters[key].grad is None), f"{what}: {key}"
            if parameter.grad is not None:
                assert_same(parameter.grad, parameters[key].grad, f"{what}: gradient of {key}")
        buffers = dict(eager.named_buffers())
        for key, buffer in traced.named_buffers():
            if key in buffers:
                assert_same(buffer, buffers[key], f"{what}: {key}")

    def assert_same_outputs(mode: str, seed: int) -> None:
        for got, want in zip(call(traced, mode, args, seed), call(eager, mode, args, seed), strict=True):
            assert_same(got, want, f"{mode} {seed}")
        compare(f"after {mode} {seed}")

    for seed, mode in enumerate(MIXED):
        assert_same_outputs(mode, seed)
    for make in optimizers_of:
        optimizers = [make([p for p in model.parameters() if p.requires_grad]) for model in (traced, eager)]
        clips = [fxprune.clip_gradients(optimizer, max_norm=0.5) for optimizer in optimizers]
        for step in range(3):
            for model, optimizer in zip((traced, eager), optimizers, strict=True):
                optimizer.zero_grad()
                outputs = [o for o in call(model, "train", args, step) if o.requires_grad]
                torch.stack([(o.double() ** 2).mean() for o in outputs]).sum().backward()
                optimizer.step()
            compare(f"step {step}")
        for clip in clips:
            clip.remove()
    for seed, mode in enumerate(("eval", "train", "eval")):
        assert_same_outputs(mode, seed)
    want = call(traced, "eval", args)
    final = fxprune.finalize(traced, shrink=False)
    assert not reparametrized(final)
    for got, value in zip(call(final, "eval", args), want, strict=True):
        assert_same(got, value, "finalized")
    assert_same(final.get_parameter(name), view_of(traced, name), "finalized")


# ---- what the graphs compute


@pytest.mark.parametrize("system", SYSTEMS)
def test_mask_on_a_carried_system_multiplies_what_it_computes(system: str) -> None:
    assert_same_as_eager(*twins("linear", system))


@pytest.mark.parametrize("system", INSERTED)
def test_mask_on_an_inserted_norm_multiplies_what_it_computes(system: str) -> None:
    assert_same_as_eager(*twins("linear", system, INSERTED[system]))


@pytest.mark.parametrize("layer", ["root", "conv2d", "transposed1d", "embedding", "lstm", "attention", "encoder layer"])
@pytest.mark.parametrize("system", ["weight norm", "spectral norm"])
def test_masks_over_norms_of_every_layer_follow_eager(layer: str, system: str) -> None:
    assert_same_as_eager(*twins(layer, system))


@pytest.mark.parametrize("layer", ["conv2d", "transposed1d", "lstm"])
@pytest.mark.parametrize("system", ["legacy weight norm", "legacy spectral norm"])
def test_masks_over_legacy_norms_of_every_layer_follow_eager(layer: str, system: str) -> None:
    assert_same_as_eager(*twins(layer, system))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("system", ["weight norm", "spectral norm", "legacy spectral norm"])
def test_masks_over_norms_follow_eager_in_other_precisions(dtype: torch.dtype, system: str) -> None:
    # Adam's eps is 0 in float16
    assert_same_as_eager(*twins("linear", system, dtype=dtype), optimizers_of=(sgd,))


def test_a_power_iteration_sees_the_weight_without_its_mask() -> None:
    traced, _, args, name = twins("linear", "spectral norm")
    bare = normed(mlp, parametrizations.spectral_norm, name)
    bare.load_state_dict({key: value for key, value in traced.state_dict().items() if not key.endswith("_mask")})
    for _ in range(3):
        call(traced, "train", args)
        call(bare, "train", args)
        for vector in ("_u", "_v"):
            key = f"0.parametrizations.weight.0.{vector}"
            assert_same(traced.get_buffer(key), bare.get_buffer(key), key)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = parametrizations.spectral_norm(nn.Linear(6, 6))
        self.again = self.layer

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.layer(x).relu())


def test_a_shared_layer_is_masked_at_each_call() -> None:
    eager = Twice()
    traced = fxprune.trace(copy.deepcopy(eager), X)
    mask = half_of(torch.Size([6, 6]))
    prune.custom_from_mask(traced, "again.weight", mask)
    eager.eval()
    add_mask(eager.layer, "weight", mask)
    for mode in MIXED:
        assert_same(call(traced, mode, X)[0], call(eager, mode, X)[0], mode)
    assert sum("mask" in str(node.target) for node in traced.graphs["train"].nodes) == 2


# ---- what masks are made of


@pytest.fixture
def weight_normed() -> TracedModule:
    """A network whose effective weights are ordered otherwise than the directions that it stores."""
    model = mlp()
    parametrizations.weight_norm(model[0])
    with torch.no_grad():
        model[0].parametrizations.weight.original0.mul_(torch.rand(8, 1) * 3)
    return fxprune.trace(model, X)


def plain_twin(traced: TracedModule) -> nn.Module:
    """An eager model with the effective weights."""
    model = mlp()
    for name in ("0.weight", "2.weight", "0.bias", "2.bias"):
        model.get_parameter(name).data.copy_(view_of(traced, name))
    return model


def test_methods_select_among_effective_weights_and_compose_as_in_torch(weight_normed: TracedModule) -> None:
    eager = plain_twin(weight_normed)
    prune.l1_unstructured(weight_normed, "0.weight", 0.4)
    prune.ln_structured(weight_normed, "0.weight", 2, n=2, dim=0)
    torch.manual_seed(1)
    prune.random_unstructured(weight_normed, "0.weight", 0.3)
    torch_prune.l1_unstructured(eager[0], "weight", 0.4)
    torch_prune.ln_structured(eager[0], "weight", 2, n=2, dim=0)
    torch.manual_seed(1)
    torch_prune.random_unstructured(eager[0], "weight", 0.3)
    assert_same(weight_normed.get_buffer("0.weight_mask"), eager[0].weight_mask, "mask")
    assert_same(view_of(weight_normed, "0.weight"), eager[0].weight.detach(), "values")
    inner = "0.parametrizations.weight.original"
    assert list(weight_normed.state_dict()) == [
        "0.bias",
        "0.weight_mask",
        f"{inner}0",
        f"{inner}1",
        "2.weight",
        "2.bias",
    ]


def test_global_selection_compares_effective_weights(weight_normed: TracedModule) -> None:
    eager = plain_twin(weight_normed)
    method = torch_prune.L1Unstructured
    for amount in (0.4, 0.5):
        prune.global_unstructured(weight_normed, ["0.weight", "2.weight"], method, amount=amount)
        torch_prune.global_unstructured([(eager[0], "weight"), (eager[2], "weight")], method, amount=amount)
        for layer in ("0", "2"):
            assert_same(weight_normed.get_buffer(f"{layer}.weight_mask"), eager[int(layer)].weight_mask, layer)


@pytest.mark.parametrize("importance", ["l1", "l2", "taylor"])
def test_entries_are_scored_by_the_effective_weight(weight_normed: TracedModule, importance: str) -> None:
    reference = fxprune.trace(plain_twin(weight_normed), X)
    given = {"loader": [(X[0], torch.randn(3, 4))], "loss": nn.functional.mse_loss} if importance == "taylor" else {}
    before = {name: value.clone() for name, value in weight_normed.state_dict().items()}
    names = ["0.weight", "2.weight"]
    for _ in range(2):  # the second time with masks
        found = fxprune.importance.scores(weight_normed, names, importance, **given)
        want = fxprune.importance.scores(reference, names, importance, **given)
        for name in names:
            torch.testing.assert_close(found[name], want[name], rtol=1e-5, atol=1e-7)
        for traced in (weight_normed, reference):
            prune.custom_from_mask(traced, "0.weight", half_of(torch.Size([8, 6])))
    assert all(torch.equal(weight_normed.state_dict()[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in weight_normed.parameters())


def test_a_score_of_ones_own_sees_plain_parameters(weight_normed: TracedModule) -> None:
    def score(traced: TracedModule, names: Any, evidence: Any) -> dict[str, Tensor]:
        return {name: traced.get_parameter(name).detach() ** 4 for name in names}

    found = fxprune.importance.scores(weight_normed, "0.weight", score)
    assert_same(found["0.weight"], view_of(weight_normed, "0.weight") ** 4, "score")


def test_a_schedule_chooses_among_what_is_computed_at_each_step(weight_normed: TracedModule) -> None:
    schedule = fxprune.Schedule(weight_normed, "0.weight", torch_prune.L1Unstructured, 0.75, curve="linear", stop=3)
    optimizer = torch.optim.SGD(weight_normed.parameters(), lr=0.5)
    dead = torch.zeros(8, 6, dtype=torch.bool)
    for step in range(4):
        call(weight_normed, "train", X)[0].square().mean().backward()
        optimizer.step()
        effective = view_of(weight_normed, "0.weight").abs()
        assert schedule.step() == pytest.approx(0.75 * step / 3)
        now = weight_normed.get_buffer("0.weight_mask") == 0 if step else dead
        assert bool(now[dead].all())
        if step:
            assert effective[now & ~dead].max() <= effective[~now].min()
        dead = now


def test_a_function_of_a_schedule_that_fails_leaves_no_new_zeros(weight_normed: TracedModule) -> None:
    def request(gone: float) -> None:
        prune.l1_unstructured(weight_normed, "0.weight", 0.5)
        raise ValueError("stop")

    schedule = fxprune.Schedule(weight_normed, None, request, 0.5)
    with pytest.raises(ValueError, match="stop"):
        schedule.step()
    assert bool((weight_normed.get_buffer("0.weight_mask") == 1).all())


def test_patterns_take_a_weight_or_what_it_is_computed_from(weight_normed: TracedModule) -> None:
    legacy = fxprune.trace(normed(mlp, SYSTEMS["legacy weight norm"], "0.weight"), X)
    for traced, sources in ((weight_normed, "0.parametrizations.weight.original"), (legacy, "0.weight_")):
        by_weight, by_all = copy.deepcopy(traced), copy.deepcopy(traced)
        prune.l1_unstructured(by_weight, "*.weight", 0.5)
        assert set(masked(by_weight)) == {"0.weight", "2.weight"}
        prune.l1_unstructured(by_all, "*", 0.5)
        assert "0.weight" not in masked(by_all)
        assert sum(name.startswith(sources) for name in masked(by_all)) == 2
        prune.l1_unstructured(by_weight, "*.weight", 0.5)  # masked ones, too
        assert int((by_weight.get_buffer("0.weight_mask") == 0).sum()) == 36


# ---- what takes masks and norms away


@pytest.mark.parametrize("system", ["weight norm", "legacy weight norm", "spectral norm", "legacy spectral norm"])
def test_removing_a_norm_leaves_the_mask_above_it(system: str) -> None:
    traced, _, args, name = twins("linear", system)
    remove = fxprune.remove_weight_norm if "weight" in system else fxprune.remove_spectral_norm
    trained = call(traced, "train", args)[0]
    before, values, mask = call(traced, "eval", args)[0], view_of(traced, name), traced.get_buffer("0.weight_mask")
    with pytest.raises(PruningError, match="cannot be written into"):
        prune.remove(traced, name)
    assert prune.is_pruned(traced, name)
    remove(traced, name)
    assert list(traced.state_dict()) == ["0.bias", "0.weight_orig", "0.weight_mask", "2.weight", "2.bias"]
    assert masked(traced) == reparametrized(traced) == [name]
    assert_same(traced.get_buffer("0.weight_mask"), mask, "mask")
    assert_same(call(traced, "eval", args)[0], before, "without the norm")
    if "weight" in system:
        assert_same(call(traced, "train", args)[0], trained, "train mode without the norm")
    prune.l1_unstructured(traced, name, 1)
    prune.remove(traced, name)
    assert list(traced.state_dict()) == list(mlp().state_dict())
    assert int((traced.get_parameter(name) != values).sum()) == 1


def test_masks_below_and_above_a_norm_are_two(weight_normed: TracedModule) -> None:
    below, above = half_of(torch.Size([8, 6])), torch.ones(8, 6)
    below[::3] = 1  # a row of zeros has no norm
    above[:, 1] = 0
    inner = "0.parametrizations.weight.original"
    g, v = (weight_normed.get_parameter(f"{inner}{i}").detach().clone() for i in range(2))
    prune.custom_from_mask(weight_normed, f"{inner}1", below)
    prune.custom_from_mask(weight_normed, "0.weight", above)
    want = above * torch._weight_norm(below * v, g, 0)
    assert_same(view_of(weight_normed, "0.weight"), want, "value")
    assert set(masked(weight_normed)) == {f"{inner}1", "0.weight"}
    final = fxprune.finalize(weight_normed, shrink=False)
    assert_same(final.get_parameter("0.weight").detach(), want, "finalized")
    fxprune.remove_weight_norm(weight_normed, "0.weight")
    assert masked(weight_normed) == ["0.weight"]
    assert_same(view_of(weight_normed, "0.weight"), want, "without the norm")


def test_a_norm_on_a_masked_weight_goes_on_its_unmasked_values() -> None:
    traced = fxprune.trace(mlp(), X)
    mask = half_of(torch.Size([8, 6]))
    weight = traced.get_parameter("0.weight").detach().clone()
    prune.custom_from_mask(traced, "0.weight", mask)
    with pytest.raises(PruningError, match=r"0\.weight_orig"):
        fxprune.weight_norm(traced, "0.weight")
    fxprune.weight_norm(traced, "0.weight_orig")
    want = mask * torch._weight_norm(weight, weight.norm(dim=1, keepdim=True), 0)
    torch.testing.assert_close(view_of(traced, "0.weight"), want)
    torch.testing.assert_close(fxprune.importance.scores(traced, "0.weight", "l1")["0.weight"], want.abs())
    fxprune.remove_weight_norm(traced, "0.weight_orig")
    assert masked(traced) == reparametrized(traced) == ["0.weight"]


# ---- bad input


class ByHand(nn.Linear):
    """A mask of the user's own, under a name like fxprune's."""

    def __init__(self) -> None:
        super().__init__(6, 4)
        self.register_buffer("weight_mask", half_of(torch.Size([4, 6])))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.weight_mask, self.bias)


def test_a_buffer_of_the_model_that_is_called_like_a_mask_is_none() -> None:
    model = nn.Sequential(parametrizations.weight_norm(ByHand()))
    traced = fxprune.trace(model, X)
    assert not prune.is_pruned(traced)
    with pytest.raises(PruningError, match="Rename it"):
        prune.l1_unstructured(traced, "0.weight", 0.5)
    final = fxprune.finalize(traced, shrink=False)
    assert_same(call(final, "eval", X)[0], call(model, "eval", X)[0], "finalized")


class VectorsByHand(nn.Linear):
    """Buffers of the user's own, called like those of a spectral norm."""

    def __init__(self) -> None:
        super().__init__(6, 4)
        self.register_buffer("weight_u", torch.ones(4))
        self.register_buffer("weight_v", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.weight_v) * self.weight_u


def test_a_mask_that_would_be_taken_for_one_over_a_norm_is_refused() -> None:
    model = nn.Sequential(VectorsByHand())
    traced = fxprune.trace(model, X)
    with pytest.raises(PruningError, match=r"0\.weight_u and 0\.weight_v"):
        prune.l1_unstructured(traced, "0.weight", 0.5)
    prune.l1_unstructured(traced, "0.bias", 0.5)
    final = fxprune.finalize(traced, shrink=False)
    assert_same(call(final, "eval", X)[0], call(traced, "eval", X)[0], "finalized")


def test_a_spectral_norm_without_an_eval_graph_has_no_weight_to_choose_from() -> None:
    model = normed(mlp, parametrizations.spectral_norm, "0.weight")
    traced = fxprune.trace(model.train(), X, modes=("train",))
    with pytest.raises(PruningError, match=r'modes=\("train", "eval"\)'):
        prune.l1_unstructured(traced, "0.weight", 0.5)
    assert not prune.is_pruned(traced)


def test_masks_of_another_shape_and_failing_methods_leave_everything(weight_normed: TracedModule) -> None:
    before = list(weight_normed.state_dict())
    with pytest.raises(PruningError, match="expand_as"):
        prune.custom_from_mask(weight_normed, "0.weight", torch.ones(8, 1))
    with pytest.raises(PruningError, match="smaller than"):
        prune.l1_unstructured(weight_normed, "0.weight", 49)
    assert list(weight_normed.state_dict()) == before
    prune.l1_unstructured(weight_normed, "0.weight", 9)
    mask = weight_normed.get_buffer("0.weight_mask").clone()
    with pytest.raises(PruningError, match="smaller than"):
        prune.l1_unstructured(weight_normed, "0.weight", 40)
    assert_same(weight_normed.get_buffer("0.weight_mask"), mask, "mask")
    with pytest.raises(NameLookupError, match="belongs to the masked parameter"):
        prune.l1_unstructured(weight_normed, "0.weight_mask", 1)


def test_state_of_an_optimizer_is_fresh_where_a_norm_was_under_the_mask() -> None:
    traced, _, args, _ = twins("linear", "legacy spectral norm")
    optimizer = torch.optim.SGD(traced.parameters(), lr=0.1, momentum=0.9)
    call(traced, "train", args)[0].square().mean().backward()
    optimizer.step()
    final = fxprune.finalize(traced, shrink=False)
    with pytest.warns(FxpruneWarning, match=r"0\.weight: fresh state, since a norm computed it"):
        after = fxprune.optimizer_after(final, optimizer)
    assert final.get_parameter("0.weight") not in after.state
    assert final.get_parameter("2.weight") in after.state
