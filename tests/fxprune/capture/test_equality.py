"""Eager with torch's own prune hooks against the traced graph with mask nodes, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fxprune
from tests.networks import NETWORKS

CNNS = {
    "resnet20_cifar10": ("features.stage1.unit2.body.conv1.conv.weight", "output.weight"),
    "seresnet20_cifar10": ("features.stage1.unit1.se.conv1.weight", "features.stage1.unit2.body.conv1.conv.weight"),
    "mobilenetv2_wd4": ("features.stage1.unit1.conv3.conv.weight", "features.stage2.unit1.conv2.conv.weight"),
}


class Pair(NamedTuple):
    name: str
    eager: nn.Module
    traced: fxprune.TracedModule
    sample: Callable[[int], torch.Tensor]


def _pruned_pair(name: str, model: nn.Module, sample: Callable[[int], torch.Tensor], names: tuple[str, ...]) -> Pair:
    traced = fxprune.trace(copy.deepcopy(model), (sample(3),))
    for i, parameter in enumerate(names):
        path, _, attribute = parameter.rpartition(".")
        prune.l1_unstructured(model.get_submodule(path), attribute, amount=0.3 + 0.1 * i)
        fxprune.prune.l1_unstructured(traced, parameter, amount=0.3 + 0.1 * i)
    return Pair(name, model, traced, sample)


@pytest.fixture(scope="session", params=[*NETWORKS, *CNNS])
def pair(request: pytest.FixtureRequest) -> Pair:
    torch.manual_seed(0)
    if request.param in NETWORKS:
        build, sample, names = NETWORKS[request.param]
        return _pruned_pair(request.param, build(), sample, names)
    model = request.getfixturevalue("pytorchcv_model")(request.param)
    size = model.in_size[0]
    return _pruned_pair(request.param, model, lambda n: torch.randn(n, 3, size, size), CNNS[request.param])


@pytest.fixture
def fresh(pair: Pair) -> Iterator[Pair]:
    """The pair in one common state, which is put back afterwards."""
    state = copy.deepcopy(pair.eager.state_dict())
    pair.eager.load_state_dict(state)
    pair.traced.load_state_dict(state)
    yield pair
    pair.eager.load_state_dict(state)
    pair.traced.load_state_dict(state)


def _run(module: nn.Module, x: torch.Tensor, training: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(7)
    module.train(training)
    module.zero_grad()
    output = module(x)
    output.square().mean().backward()
    return output.detach(), [p.grad.clone() for p in module.parameters() if p.grad is not None]


def _same_state(pair: Pair) -> bool:
    left, right = pair.eager.state_dict(), pair.traced.state_dict()
    return list(left) == list(right) and all(torch.equal(left[k], right[k]) for k in left)


def test_state_dict_has_the_keys_order_and_values_of_the_hooked_model(fresh: Pair) -> None:
    assert _same_state(fresh)
    assert [n for n, _ in fresh.eager.named_parameters()] == [n for n, _ in fresh.traced.named_parameters()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch", [2, 5])
def test_outputs_gradients_and_running_statistics_are_the_same_bits(fresh: Pair, training: bool, batch: int) -> None:
    x = fresh.sample(batch)
    want, want_gradients = _run(fresh.eager, x, training)
    got, got_gradients = _run(fresh.traced, x, training)
    assert torch.equal(want, got)
    assert len(want_gradients) == len(got_gradients)
    assert all(map(torch.equal, want_gradients, got_gradients))
    assert _same_state(fresh)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_three_optimizer_steps_leave_the_same_bits(fresh: Pair, kind: Any) -> None:
    options = {"lr": 0.05, "momentum": 0.9} if kind is torch.optim.SGD else {"lr": 0.01}
    batches = [fresh.sample(3) for _ in range(3)]
    for module in (fresh.eager, fresh.traced):
        optimizer = kind(module.parameters(), **options)
        for x in batches:
            _run(module, x, training=True)
            optimizer.step()
    assert _same_state(fresh)


def test_eval_on_a_single_row_is_eager_on_a_single_row(fresh: Pair) -> None:
    x = fresh.sample(1)
    assert torch.equal(fresh.eager.eval()(x), fresh.traced.eval()(x))


@pytest.mark.parametrize("with_gradients", [True, False])
def test_finalized_is_the_masked_model_bit_for_bit(pair: Pair, with_gradients: bool) -> None:
    final = fxprune.finalize(pair.traced.eval(), shrink=False)
    with torch.set_grad_enabled(with_gradients):
        for batch in (1, 3, 4):
            x = pair.sample(batch)
            assert torch.equal(pair.traced(x), final(x))
    for name, value in fxprune.finalize(final, shrink=False).state_dict().items():
        assert torch.equal(value, final.state_dict()[name])


@pytest.mark.parametrize("name", NETWORKS)
def test_finalized_in_float64_is_the_masked_model_and_has_the_keys_of_the_dense_one(name: str) -> None:
    build, sample, names = NETWORKS[name]
    x = sample(3)
    x = x.double() if x.is_floating_point() else x
    traced = fxprune.trace(build().double(), (x,))
    for parameter in names:
        fxprune.prune.random_unstructured(traced, parameter, 0.4)
    final = fxprune.finalize(traced.eval(), shrink=False)
    assert torch.equal(traced(x), final(x))
    assert list(final.state_dict()) == list(build().state_dict())


def test_onnxruntime_computes_what_the_masked_model_computes(pair: Pair, tmp_path: Any) -> None:
    final = fxprune.finalize(pair.traced.eval())
    path = tmp_path / "model.onnx"
    fxprune.export.to_onnx(final, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 4):
        x = pair.sample(batch)
        want = pair.traced(x).detach()
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert (want - torch.from_numpy(got)).abs().max() <= 1e-4 * want.abs().max()
