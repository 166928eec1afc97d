"""Models on the device "meta": planned with, then given values."""

import contextlib
import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import ArgumentError, CaptureError, EvalOnlyWarning, FxpruneError, FxpruneWarning, SampleError


class _Network(nn.Module):
    """With tied weights, a recurrent layer, constants made in forward, and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.lstm = nn.LSTM(8, 6, batch_first=True)
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 6)
        self.third = nn.Linear(6, 12)
        self.third.weight = self.first.weight
        self.register_buffer("offset", torch.ones(12))

    def forward(self, images: Tensor) -> Tensor:
        steps = torch.relu(self.norm(self.convolution(images))).flatten(2).transpose(1, 2)
        last = self.lstm(steps)[0][:, -1]
        hidden = self.second(torch.relu(self.first(last)))
        return self.third(hidden) + self.offset + torch.arange(12, device=images.device)


IMAGES = torch.randn(2, 3, 6, 6)


def _hollow(build: type[nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def _planned(model: nn.Module) -> fxprune.TracedModule:
    with pytest.warns(FxpruneWarning, match=r"weight.* have no values.*load_state_dict\(state, assign=True\)"):
        return fxprune.trace(model, IMAGES)


def test_groups_are_those_of_the_model_with_values() -> None:
    model = _hollow(_Network)
    before = dict(model.named_parameters(remove_duplicate=False))
    traced = _planned(model)
    groups = fxprune.channel_groups(traced)
    assert groups.table() == fxprune.channel_groups(fxprune.trace(_Network(), IMAGES)).table()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert parameter is before[name]
        assert traced.get_parameter(name) is parameter


def test_given_values_it_is_what_trace_gives_of_them() -> None:
    traced, eager = _planned(_hollow(_Network)), _Network()
    fxprune.channel_groups(traced)
    traced.load_state_dict(copy.deepcopy(eager.state_dict()), assign=True)
    images = torch.randn(5, 3, 6, 6)
    for mode in (True, False):
        assert torch.equal(traced.train(mode)(images), eager.train(mode)(images))
    reference = fxprune.trace(eager, IMAGES)
    assert torch.equal(traced.norm.running_mean, eager.norm.running_mean)
    for module in (traced, reference):
        fxprune.prune.channels(module, amount=0.5, ignore=("third.weight",))
    final, expected = fxprune.finalize(traced), fxprune.finalize(reference)
    assert final.convolution.weight.shape[0] < 8
    shapes = [{n: t.shape for n, t in module.state_dict().items()} for module in (final, expected)]
    assert shapes[0] == shapes[1]
    assert torch.equal(final(images), expected(images))


def test_what_was_tied_is_tied_again_where_values_are_the_same() -> None:
    eager = _Network()
    for differs in (False, True):
        state = copy.deepcopy(eager.state_dict())
        state["third.weight"] = state["third.weight"] + differs
        traced = _planned(_hollow(_Network))
        traced.load_state_dict(state, assign=True)
        first, third = traced.get_parameter("first.weight"), traced.get_parameter("third.weight")
        assert (first is third) == (not differs)
        assert len([*traced.parameters()]) == len([*eager.parameters()]) + differs
        assert torch.equal(third, eager.third.weight + differs)
    del state["third.weight"]  # as the transformers library stores what is tied
    traced = _planned(_hollow(_Network))
    traced.load_state_dict(state, strict=False, assign=True)
    assert traced.get_parameter("third.weight") is traced.get_parameter("first.weight")
    assert torch.equal(traced.eval()(IMAGES), eager.eval()(IMAGES))


@pytest.mark.parametrize("caches", [False, True])
def test_a_llama_without_values_is_grouped_and_given_them(transformers: Any, caches: bool) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    options = {"vocab_size": 40, "num_hidden_layers": 1, "tie_word_embeddings": True, "use_cache": caches, **sizes}
    build = partial(transformers.LlamaForCausalLM, transformers.LlamaConfig(**options))
    eager = build().eval()
    sample = {"input_ids": torch.randint(0, 40, (2, 6))}
    with torch.device("meta"):
        hollow = build().eval()
    with pytest.warns(FxpruneWarning, match="have no values"):
        traced = fxprune.trace(hollow, kwargs=sample, modes=("eval",))
    table = fxprune.channel_groups(traced).table()
    assert table == fxprune.channel_groups(fxprune.trace(eager, kwargs=sample, modes=("eval",))).table()
    traced.load_state_dict(eager.state_dict(), assign=True)
    rotary = eager.model.rotary_emb
    for name in ("inv_freq", "original_inv_freq"):  # which are not stored
        traced.get_submodule("model.rotary_emb")._buffers[name] = rotary.get_buffer(name)
    assert traced.get_parameter("lm_head.weight") is traced.get_parameter("model.embed_tokens.weight")
    assert torch.equal(traced(**sample).logits, eager(**sample).logits)


@pytest.mark.parametrize("is_copied", [False, True])
def test_what_needs_values_is_refused_by_name(tmp_path, is_copied: bool) -> None:  # type: ignore[no-untyped-def]
    traced = _planned(_hollow(_Network))
    if is_copied:
        traced = copy.deepcopy(traced)
    state = _Network().state_dict()
    asked = [
        lambda: traced(IMAGES),
        lambda: fxprune.prune.channels(traced, amount=0.5),
        lambda: fxprune.prune.l1_unstructured(traced, "first.weight", amount=0.5),
        lambda: fxprune.prune.random_unstructured(traced, "first.weight", amount=0.5),
        lambda: fxprune.weight_norm(traced, "first.weight"),
        lambda: fxprune.sensitivity(traced, [IMAGES]),
        lambda: fxprune.reconstruct(traced, [IMAGES]),
        lambda: fxprune.finalize(traced),
        lambda: fxprune.save(traced, tmp_path / "model.fxp"),
        lambda: fxprune.export.to_onnx(traced, tmp_path / "model.onnx"),
        lambda: fxprune.export.to_program(traced, tmp_path / "model.pt2"),
        lambda: fxprune.export.to_torchscript(traced, tmp_path / "model.pt"),
        lambda: fxprune.compare(_Network(), traced, inputs=IMAGES),
        lambda: traced.load_state_dict(state),
    ]
    for ask in asked:
        with pytest.raises(FxpruneError, match=r"convolution\.weight.* no values.*load_state_dict\(state, assign=True"):
            ask()
    assert not list(tmp_path.iterdir())
    assert not fxprune.prune.is_pruned(traced)


def test_a_buffer_that_no_state_has_is_assigned() -> None:
    class Rotated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.register_buffer("angles", torch.arange(6.0), persistent=False)

        def forward(self, values: Tensor) -> Tensor:
            return self.layer(values) * self.angles

    traced, eager = _planned(_hollow(Rotated)), Rotated()
    traced.load_state_dict(eager.state_dict(), assign=True)
    with pytest.raises(ArgumentError, match=r"angles of the traced module have no values.*No state dict holds them"):
        traced(IMAGES)
    traced.angles = torch.arange(6.0)
    assert torch.equal(traced(IMAGES), eager(IMAGES))


def test_refused_leaves_the_model() -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.scale = torch.ones(6)

        def forward(self, values: Tensor) -> Tensor:
            return self.layer(values) * self.scale

    normed = _hollow(_Network)
    nn.utils.parametrizations.weight_norm(normed.first)
    for model, error in ((_hollow(Held), CaptureError), (normed, CaptureError), (_hollow(_Network), SampleError)):
        sample = IMAGES.to("meta") if error is SampleError else IMAGES
        before = list(model.parameters())
        with pytest.raises(error, match="meta"):
            fxprune.trace(model, sample)
        assert all(now is then for now, then in zip(model.parameters(), before, strict=True))


def test_gradients_of_its_own_cannot_be_compared() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values):  # type: ignore[no-untyped-def]
            return values * 2

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            return gradient * 2

    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, values: Tensor) -> Tensor:
            return Doubled.apply(self.layer(values))

    with warnings.catch_warnings(record=True) as caught, contextlib.suppress(FxpruneError):
        warnings.simplefilter("always")
        traced = fxprune.trace(_hollow(Doubling), IMAGES)
    assert [w for w in caught if issubclass(w.category, EvalOnlyWarning) and "functions of its own" in str(w.message)]
    assert traced.modes == ("eval",)
