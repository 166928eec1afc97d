"""Heads that go with those of a cache: prefill, steps over a growing and over a static cache, files."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.capture.cached_tensors import CachedTensor, cached_tensors
from fxprune.errors import InputError
from tests.decoders import (
    DECODERS,
    FREE,
    FREE_CACHE,
    decoder,
    encoder_inputs,
    encoder_shapes,
    filled,
    step,
    tokens,
    traced_step,
)
from tests.slow import slow


def _pruned(module: fxprune.TracedModule) -> fxprune.TracedModule:
    """The module with half of the heads masked that keys and values have."""
    kinds = {group.kind for group in fxprune.channel_groups(module)}
    kind = "key-value group" if "key-value group" in kinds else "attention head"
    fxprune.prune.channels(module, 0.5, kinds=kind, round_to=1)
    return module


def _masked(traced: fxprune.TracedModule, model: nn.Module) -> nn.Module:
    """The user's own class with the masked weights: an eager model that keeps every head."""
    eager = copy.deepcopy(model)
    eager.load_state_dict(fxprune.finalize(traced, shrink=False).state_dict(), strict=False)
    return eager


def _empty(module: fxprune.TracedModule, batch: int, transformers: Any) -> Any:
    layers = module.example_kwargs["past_key_values"].layers
    shapes = [(layer.keys.shape, layer.values.shape) for layer in layers]
    dtype = layers[0].keys.dtype
    none = [tuple(torch.zeros(batch, s[1], 0, s[3], dtype=dtype) for s in pair) for pair in shapes]
    return transformers.DynamicCache(none)


def _outputs(module: Any, cache: Any, batch: int, lengths: Sequence[int]) -> tuple[list[Tensor], Any]:
    """The scores of steps of these lengths, one after another, and the cache at the end."""
    torch.manual_seed(0)
    found = []
    for past, end in itertools.pairwise([0, *itertools.accumulate(lengths)]):
        call = {
            "input_ids": tokens(batch, end - past),
            "attention_mask": torch.ones(batch, end, dtype=torch.long),
            "position_ids": torch.arange(past, end)[None].repeat(batch, 1),
        }
        with torch.no_grad():
            outputs = module(**call, past_key_values=cache)
        cache = outputs.past_key_values
        found.append(outputs.logits)
    return found, cache


def _error(want: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(want, got, strict=True))


@pytest.fixture(scope="module")
def llama(transformers: Any) -> tuple[Any, fxprune.TracedModule, fxprune.TracedModule]:
    """A model, its step with half of the heads masked, and what is left of that."""
    model = decoder("Llama", transformers)
    traced = _pruned(traced_step(model, transformers))
    return model, traced, fxprune.finalize(traced, align=1)


# Mistral's window is Gemma2's, Qwen2's biases are GPT2's
_ALIKE = ("Mistral", "Qwen2")


@pytest.mark.parametrize("name", slow(DECODERS, _ALIKE))
def test_heads_leave_the_cache_and_every_step_from_an_empty_one_is_the_masked_models(
    name: str, transformers: Any
) -> None:
    model = decoder(name, transformers, scale=1.5).double()
    traced = _pruned(traced_step(model, transformers))
    final = fxprune.finalize(traced, align=1)
    eager = _masked(traced, model)
    heads = [layer.keys.shape[1] for layer in traced.example_kwargs["past_key_values"].layers]
    left = [layer.keys.shape[1] for layer in final.example_kwargs["past_key_values"].layers]
    assert left == [count // 2 for count in heads]
    for batch, lengths in ((3, (4, 1, 3)), (1, (1, 1, 1, 5))):
        want, dense = _outputs(eager, transformers.DynamicCache(), batch, lengths)
        got, small = _outputs(final, _empty(final, batch, transformers), batch, lengths)
        assert _error(want, got) < 1e-9
        assert small.get_seq_length() == sum(lengths)
        for i, (whole, rest) in enumerate(zip(dense.layers, small.layers, strict=True)):
            keys = final.plan.slice(f"past_key_values.{i}.key", whole.keys)  # type: ignore[union-attr]
            assert torch.allclose(keys, rest.keys, rtol=1e-9, atol=1e-9)
            assert rest.values.shape == (batch, left[i], sum(lengths), whole.values.shape[3])


def test_the_plan_says_which_heads_of_the_cache_are_left_and_survives_its_file(llama: Any, tmp_path: Path) -> None:
    _, _, final = llama
    plan = final.plan
    assert plan is not None
    assert "smaller in the cache: past_key_values.0.key" in str(plan)
    assert "past_key_values.1.value in the cache: 1 of 2 heads kept" in plan.explain()
    size, index = plan.cached["past_key_values.0.key"][1]
    assert (size, len(index)) == (2, 1)
    fxprune.save(final, tmp_path / "decoder.fxp")
    for again in (type(plan).from_json(plan.to_json()), fxprune.load(tmp_path / "decoder.fxp").plan):
        assert again is not None
        assert again.cached["past_key_values.0.key"][1][0] == 2
        assert torch.equal(again.cached["past_key_values.0.key"][1][1], index)
        assert again.explain() == plan.explain()


def test_the_first_step_returns_what_later_ones_take(transformers: Any) -> None:
    model = decoder("Llama", transformers, scale=1.5).double()
    later = _pruned(traced_step(model, transformers))
    eager = _masked(later, model)
    shapes = {"input_ids": FREE}
    first = fxprune.trace(eager, {"input_ids": tokens(2, 4)}, dynamic_shapes=shapes, modes=("eval",))
    first, later = fxprune.finalize(first, align=1), fxprune.finalize(later, align=1)
    assert "present.0.key in the cache: 1 of 2 heads kept" in first.plan.explain()  # type: ignore[union-attr]
    ids = tokens(3, 5)
    with torch.no_grad():
        made, expected = first(input_ids=ids), eager(input_ids=ids)
        assert _error([expected.logits], [made.logits]) < 1e-9
        call = {
            "input_ids": tokens(3, 2),
            "attention_mask": torch.ones(3, 7, dtype=torch.long),
            "position_ids": torch.arange(5, 7)[None].repeat(3, 1),
        }
        got = later(**call, past_key_values=made.past_key_values)
        want = eager(**call, past_key_values=expected.past_key_values)
    assert _error([want.logits], [got.logits]) < 1e-9


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_a_static_cache_has_fewer_heads(name: str, transformers: Any) -> None:
    model = decoder(name, transformers, scale=1.5).double()

    def inputs(batch: int, past: int) -> dict[str, Any]:
        cache = transformers.StaticCache(config=model.config, max_cache_len=20)
        return {"input_ids": tokens(batch, 3), "past_key_values": filled(model, cache, batch, past)}

    traced = _pruned(fxprune.trace(model, inputs(2, 4), modes=("eval",)))
    eager = _masked(traced, model)
    final = fxprune.finalize(traced, align=1)
    layer = traced.example_kwargs["past_key_values"].layers[0]
    small = final.example_kwargs["past_key_values"].layers[0]
    assert small.num_heads == small.keys.shape[1] == layer.keys.shape[1] // 2
    assert small.keys.shape[2] == 20
    call = {"input_ids": tokens(3, 3)}
    cache = filled(eager, transformers.StaticCache(config=model.config, max_cache_len=20), 3, 7)
    leaves = {f"past_key_values.{i}": each for i, each in enumerate(cache.layers)}
    cut = copy.deepcopy(cache)
    for (name_of, whole), each in zip(leaves.items(), cut.layers, strict=True):
        each.keys = final.plan.slice(f"{name_of}.key", whole.keys)  # type: ignore[union-attr]
        each.values = final.plan.slice(f"{name_of}.value", whole.values)  # type: ignore[union-attr]
    with torch.no_grad():
        got, want = final(**call, past_key_values=cut), eager(**call, past_key_values=cache)
    assert _error([want.logits], [got.logits]) < 1e-9
    kept = final.plan.slice("past_key_values.0.key", cache.layers[0].keys)  # type: ignore[union-attr]
    assert torch.allclose(kept, cut.layers[0].keys)  # written in place, as eager does


def test_a_head_whose_values_are_not_written_as_zero_stays(transformers: Any) -> None:
    model = decoder("Llama", transformers)
    traced = traced_step(model, transformers)
    for layer in range(2):  # the keys of a head alone: every query of it meets zeros, and its values are read evenly
        mask = torch.ones(16, 32)
        mask[:8] = 0
        fxprune.prune.custom_from_mask(traced, f"model.layers.{layer}.self_attn.k_proj.weight", mask)
    final = fxprune.finalize(traced, align=1)
    assert not final.plan.cached  # type: ignore[union-attr]


def _first(name: str, batch: int, length: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """What an encoder-decoder reads first: six words, or some sound, and the start of what it writes."""
    read = {key: x.to(dtype) if x.is_floating_point() else x for key, x in encoder_inputs(name, batch, 6).items()}
    return read | {"decoder_input_ids": tokens(batch, length)}


def _next(outputs: Any, states: Tensor, ids: Tensor, transformers: Any) -> dict[str, Any]:
    """What it reads next, with the caches that it returned."""
    encoded = transformers.modeling_outputs.BaseModelOutput(states)
    return {"encoder_outputs": encoded, "decoder_input_ids": ids, "past_key_values": outputs.past_key_values}


_LATER_SHAPES: dict[str, Any] = {
    "encoder_outputs": [FREE], "decoder_input_ids": FREE, "past_key_values": FREE_CACHE,
}  # fmt: skip


def _two_graphs(
    name: str, model: nn.Module, masked: Any, transformers: Any
) -> tuple[nn.Module, fxprune.TracedModule, fxprune.TracedModule]:
    """An encoder-decoder that keeps every head, and what is left of its first and of its later steps.

    `masked` puts masks into the later one's graph.
    """
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        outputs = model(**_first(name, 2, 4, dtype))
    sample = _next(outputs, outputs.encoder_last_hidden_state, tokens(2, 2), transformers)
    later = masked(fxprune.trace(model, sample, dynamic_shapes=_LATER_SHAPES, modes=("eval",)))
    eager = _masked(later, model)
    shapes = encoder_shapes(name) | {"decoder_input_ids": FREE}
    first = fxprune.trace(eager, _first(name, 2, 4, dtype), dynamic_shapes=shapes, modes=("eval",))
    return eager, fxprune.finalize(first, align=1), fxprune.finalize(later, align=1)


@pytest.mark.parametrize("name", ["T5", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Bart", "Whisper"))])
def test_of_an_encoder_decoder_both_caches_lose_heads_in_the_first_step_and_in_later_ones(
    name: str, transformers: Any
) -> None:
    model = decoder(name, transformers, scale=1.5).double()
    eager, first, later = _two_graphs(name, model, _pruned, transformers)
    assert {path.split(".")[2] for path in later.plan.cached} == {"decoder", "encoder"}  # type: ignore[union-attr]
    assert {path.split(".")[2] for path in first.plan.cached} == {"decoder", "encoder"}  # type: ignore[union-attr]
    for batch in (1, 3):
        call = _first(name, batch, 3)
        with torch.no_grad():
            want, got = eager(**call), first(**call)
            for length in (2, 1, 1):
                assert _error([want.logits], [got.logits]) < 1e-9
                states, ids = want.encoder_last_hidden_state, tokens(batch, length)
                want = eager(**_next(want, states, ids, transformers))
                got = later(**_next(got, states, ids, transformers))
        assert _error([want.logits], [got.logits]) < 1e-9
        whole, rest = (each.past_key_values.cross_attention_cache.layers[1] for each in (want, got))
        for kind, dense, small in (("key", whole.keys, rest.keys), ("value", whole.values, rest.values)):
            cut = later.plan.slice(f"past_key_values.1.encoder.{kind}", dense)  # type: ignore[union-attr]
            assert cut.shape[1] == dense.shape[1] // 2
            assert torch.allclose(cut, small, rtol=1e-9, atol=1e-9)


def test_what_only_the_weights_say_that_wrote_it_leaves_the_encoders_cache_whole_in_both_graphs(
    transformers: Any,
) -> None:
    model = decoder("T5", transformers, scale=1.5).double()
    with torch.no_grad():  # the values of a head are zero, which the later steps' graph cannot know
        model.decoder.block[1].layer[1].EncDecAttention.v.weight[8:16] = 0  # type: ignore[index, union-attr]
    eager, first, later = _two_graphs("T5", model, lambda traced: traced, transformers)
    assert not first.plan.cached  # type: ignore[union-attr]
    assert not later.plan.cached  # type: ignore[union-attr]
    call = _first("T5", 3, 2)
    with torch.no_grad():
        want, got, ids = eager(**call), first(**call), tokens(3, 1)
        states = want.encoder_last_hidden_state
        want = eager(**_next(want, states, ids, transformers))
        got = later(**_next(got, states, ids, transformers))
    assert _error([want.logits], [got.logits]) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["T5", "Bart", "Whisper"])
def test_two_files_with_fewer_heads_write_the_masked_models_tokens(
    name: str, transformers: Any, tmp_path: Path
) -> None:
    import onnxruntime

    model = decoder(name, transformers)
    eager, first, later = _two_graphs(name, model, _pruned, transformers)
    paths = tmp_path / "first.onnx", tmp_path / "later.onnx"
    for path, final in zip(paths, (first, later), strict=True):
        fxprune.export.to_onnx(final, path)
    shapes = {value.name: value.shape for value in onnxruntime.InferenceSession(str(paths[1])).get_inputs()}
    for part in ("decoder", "encoder"):  # of four heads in each of two layers
        assert sum(shapes[f"past_key_values.{layer}.{part}.value"][1] for layer in range(2)) < 8
    for batch in (1, 3):
        call = _first(name, batch, 1, torch.float32)
        written = fxprune.export.generate(paths[1], call, prefill=paths[0], max_new_tokens=64)
        ids = call["decoder_input_ids"]
        with torch.no_grad():
            outputs = eager(**call)
            states = outputs.encoder_last_hidden_state
            for _ in range(64):
                new = outputs.logits[:, -1:].argmax(-1)
                ids = torch.cat([ids, new], 1)
                outputs = eager(**_next(outputs, states, new, transformers))
        assert torch.equal(written, ids)


def test_files_have_the_heads_that_are_left_and_write_the_masked_models_tokens(llama: Any, tmp_path: Path) -> None:
    import onnxruntime

    model, traced, final = llama
    path = tmp_path / "decoder.onnx"
    fxprune.export.to_onnx(final, path)
    session = onnxruntime.InferenceSession(str(path))
    shapes = {value.name: value.shape for value in [*session.get_inputs(), *session.get_outputs()]}
    for layer, kind in itertools.product(range(2), ("key", "value")):
        for side in ("past_key_values", "present"):
            assert shapes[f"{side}.{layer}.{kind}"][1::2] == [1, 8]
    eager: Any = _masked(traced, model)
    for batch in (1, 3):
        prompt = tokens(batch, 4)
        mask = torch.ones_like(prompt)
        written = fxprune.export.generate(path, {"input_ids": prompt, "attention_mask": mask}, max_new_tokens=24)
        expected = eager.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=24, eos_token_id=None)
        assert torch.equal(written, expected)


def test_a_cache_of_the_dense_model_is_refused_and_the_error_says_what_to_give(llama: Any, transformers: Any) -> None:
    model, _, final = llama
    with pytest.raises(InputError, match=r"lost heads.*an empty one of its own sizes"):
        final(**step(model, transformers.DynamicCache(), 2, 3, 4))
    with pytest.raises(InputError, match="Not captured: more") as told:
        final(**final.example_kwargs, more=1)
    assert "heads" not in str(told.value)


def test_a_small_class_of_its_own_writes_back_with_fewer_heads_in_the_cache(llama: Any, transformers: Any) -> None:
    model, traced, final = llama
    small = fxprune.write_back(final, model)
    eager = _masked(traced, model)
    lengths = (4, 1, 2)
    want, _ = _outputs(eager, transformers.DynamicCache(), 2, lengths)
    got, cache = _outputs(small, transformers.DynamicCache(), 2, lengths)
    assert _error(want, got) < 1e-4
    assert cache.layers[0].keys.shape == (2, 1, 7, 8)


@pytest.mark.parametrize("request_of", [{"macs": 0.7}, {"amount": 0.4, "targets": "*.v_proj.*"}])
def test_a_class_whose_heads_are_of_one_size_writes_zeros_for_channels_that_left_the_cache(
    request_of: dict[str, Any], transformers: Any
) -> None:
    model = decoder("Llama", transformers)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:16] = 0
    traced = fxprune.trace(model, {"input_ids": tokens(2, 5)}, modes=("eval",))
    fxprune.prune.channels(traced, round_to=1, **request_of)
    final = fxprune.finalize(traced)
    assert all(layer.values.shape[-1] < 8 for layer in final(**final.example_kwargs).past_key_values.layers)
    with pytest.warns(fxprune.errors.ConfigurationWarning):  # the layers' inner sizes differ
        small = fxprune.write_back(final, model)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    lengths = (4, 1, 2)
    want, _ = _outputs(_masked(traced, model), transformers.DynamicCache(), 2, lengths)
    got, _ = _outputs(small, transformers.DynamicCache(), 2, lengths)
    assert _error(want, got) < 1e-4


class _Step(nn.Module):
    """One layer of attention over a cache, and what it returns beside the scores."""

    def __init__(self, returns: str) -> None:
        super().__init__()
        self.qkv, self.read, self.returns = nn.Linear(6, 24, bias=False), nn.Linear(8, 3), returns

    def forward(self, x: Tensor, cache: Any) -> Any:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 2).permute(2, 0, 3, 1, 4)
        keys, values = cache.update(k, v, 0)
        mixed = nn.functional.scaled_dot_product_attention(q, keys, values)
        y = self.read(mixed.transpose(1, 2).flatten(2))
        return {"scores": y, "cache": cache} | ({"keys": keys} if self.returns == "keys" else {})


@pytest.mark.parametrize("returns", ["cache", "keys"])
def test_what_is_returned_beside_the_cache_keeps_its_heads(returns: str, transformers: Any) -> None:
    torch.manual_seed(0)
    model = _Step(returns).double().eval()
    cache = transformers.DynamicCache([(torch.randn(2, 4, 3, 2).double(), torch.randn(2, 4, 3, 2).double())])
    free = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    traced = fxprune.trace(
        model,
        {"x": torch.randn(2, 5, 6).double(), "cache": cache},
        dynamic_shapes={"x": free, "cache": FREE_CACHE},
        modes=("eval",),
    )
    assert cached_tensors(traced.graphs["eval"])[:1] == [CachedTensor("cache.0.key", 1, 1)]
    mask = torch.ones(3, 4, 2, 6)
    mask[:, 1] = 0
    fxprune.prune.custom_from_mask(traced, "qkv.weight", mask.view(24, 6))
    final = fxprune.finalize(traced, align=1)
    assert final.plan is not None
    assert bool(final.plan.cached) == (returns == "cache")
    heads = 3 if returns == "cache" else 4
    x, none = torch.randn(3, 4, 6).double(), torch.zeros(3, 4, 0, 2).double()
    want = traced(x=x, cache=transformers.DynamicCache([(none, none)]))
    got = final(x=x, cache=transformers.DynamicCache([(none[:, :heads], none[:, :heads])]))
    assert (want["scores"] - got["scores"]).abs().max() < 1e-9
    assert got["cache"].layers[0].values.shape == (3, heads, 4, 2)
