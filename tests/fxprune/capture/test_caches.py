"""Caches of the transformers library as inputs and outputs of a graph, and outputs of classes of a library's own."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.export import Dim

import fxprune
from fxprune.errors import FixedSizeWarning, FxpruneError, InputError
from tests.decoders import (
    DECODERS,
    ENCODER_DECODERS,
    FREE,
    FREE_CACHE,
    decoder,
    encoder_inputs,
    encoder_shapes,
    filled,
    flat,
    near,
    same,
    step,
    tokens,
    traced_step,
)
from tests.slow import slow


# steps of these are compared with eager where heads leave their caches
@pytest.mark.parametrize("name", slow(DECODERS, ("Gemma2", "Phi3", "GPT2")))
def test_a_step_over_a_cache_is_eagers_at_every_batch_length_and_past(name: str, transformers: Any) -> None:
    model = decoder(name, transformers)
    traced = traced_step(model, transformers)
    for batch, length, past in ((2, 3, 4), (1, 1, 9), (3, 1, 1), (3, 5, 0)):
        inputs = step(model, transformers.DynamicCache(), batch, length, past)
        given = inputs
        if not past:  # a graph that takes entries takes an empty tensor of each
            shapes = [layer.keys.shape for layer in traced.example_kwargs["past_key_values"].layers]
            empty = [(torch.zeros(batch, heads, 0, size),) * 2 for _, heads, _, size in shapes]
            given = inputs | {"past_key_values": transformers.DynamicCache(empty)}
        with torch.no_grad():
            found = traced(**given)
            assert near(found, model(**copy.deepcopy(inputs)))
        assert isinstance(found.past_key_values, transformers.DynamicCache)
        assert found.past_key_values.get_seq_length() == past + length
        assert given["past_key_values"].get_seq_length() == past  # a graph writes into no container of the caller's


@pytest.mark.parametrize("name", ["Llama", "Mistral", "GPT2"])
@pytest.mark.parametrize("given", [False, True])
def test_the_first_step_makes_the_cache_that_eager_makes(name: str, given: bool, transformers: Any) -> None:
    model = decoder(name, transformers)

    def inputs(batch: int, length: int) -> dict[str, Any]:
        cache = {"past_key_values": transformers.DynamicCache()} if given else {}
        return {"input_ids": tokens(batch, length)} | cache

    shapes = {"input_ids": FREE} | ({"past_key_values": FREE_CACHE} if given else {})
    traced = fxprune.trace(model, inputs(2, 4), dynamic_shapes=shapes, modes=("eval",))
    for batch, length in ((2, 4), (1, 3), (3, 10)):  # beyond Mistral's window of 6, too
        call = inputs(batch, length)
        assert near(traced(**copy.deepcopy(call)), model(**call))


@pytest.mark.parametrize("name", slow(ENCODER_DECODERS, ("Bart",)))  # its layers are Whisper's
def test_an_encoder_decoder_is_captured_for_its_first_step_and_for_those_with_a_cache(
    name: str, transformers: Any
) -> None:
    model = decoder(name, transformers)

    def first(batch: int, length: int, read: int) -> dict[str, Any]:
        return encoder_inputs(name, batch, read) | {"decoder_input_ids": tokens(batch, length)}

    def later(batch: int, length: int, past: int, read: int) -> dict[str, Any]:
        with torch.no_grad():
            before = model(**first(batch, past, read))
        states = transformers.modeling_outputs.BaseModelOutput(before.encoder_last_hidden_state)
        return {
            "encoder_outputs": states,
            "decoder_input_ids": tokens(batch, length),
            "past_key_values": before.past_key_values,
        }

    shapes: dict[str, Any] = encoder_shapes(name) | {"decoder_input_ids": FREE}
    traced = fxprune.trace(model, first(2, 5, 12), dynamic_shapes=shapes, modes=("eval",))
    for batch, length, read in ((3, 1, 9), (1, 4, 12)):
        call = first(batch, length, read)
        assert near(traced(**call), model(**call))
    shapes = {"encoder_outputs": [FREE], "decoder_input_ids": FREE, "past_key_values": FREE_CACHE}
    traced = fxprune.trace(model, later(2, 2, 4, 12), dynamic_shapes=shapes, modes=("eval",))
    for batch, length, past, read in ((3, 1, 6, 9), (1, 3, 1, 12)):
        call = later(batch, length, past, read)
        found = traced(**call)
        assert isinstance(found.past_key_values, transformers.EncoderDecoderCache)
        assert near(found, model(**copy.deepcopy(call)))


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_a_static_cache_is_written_to_in_place_as_eager_does(name: str, transformers: Any) -> None:
    model = decoder(name, transformers)

    def inputs(batch: int, past: int) -> dict[str, Any]:
        cache = transformers.StaticCache(config=model.config, max_cache_len=20)
        return {"input_ids": tokens(batch, 3), "past_key_values": filled(model, cache, batch, past)}

    sample = inputs(2, 4)
    before = copy.deepcopy(sample)
    traced = fxprune.trace(model, sample, modes=("eval",))
    final = fxprune.finalize(traced)
    assert same(sample, before)  # the sample itself is not written to
    for module in (traced, final):
        for batch, past in ((2, 4), (3, 7)):
            call = inputs(batch, past)
            eager = copy.deepcopy(call)
            assert near(module(**call), model(**eager))
            assert near(call, eager)


def test_a_cache_of_a_window_holds_for_the_past_of_the_sample_alone_and_says_so(transformers: Any) -> None:
    model = decoder("Mistral", transformers)

    def inputs(past: int) -> dict[str, Any]:
        cache = transformers.DynamicCache(config=model.config)
        return {"input_ids": tokens(2, 3), "past_key_values": filled(model, cache, 2, past)}

    shapes = {"input_ids": FREE, "past_key_values": FREE_CACHE}
    with pytest.warns(FixedSizeWarning, match="fixed to 4"):
        traced = fxprune.trace(model, inputs(4), dynamic_shapes=shapes, modes=("eval",))
    call = inputs(4)
    assert near(traced(**call), model(**copy.deepcopy(call)))
    for past in (5, 9):
        with pytest.raises(InputError, match="captured was"):
            traced(**inputs(past))


def test_layers_that_no_graph_can_hold_are_named(transformers: Any) -> None:
    model = decoder("Llama", transformers)
    cache = filled(model, transformers.DynamicCache(), 2, 4)
    cache.layers[1].__class__ = type("OwnLayer", (type(cache.layers[1]),), {})
    with pytest.raises(FxpruneError, match=r"a layer of class OwnLayer.*use_cache=False"):
        fxprune.trace(model, {"input_ids": tokens(2, 3), "past_key_values": cache})
    cache = transformers.DynamicCache(offloading=False)
    cache.offloading = True
    with pytest.raises(FxpruneError, match="is offloaded"):
        fxprune.trace(model, {"input_ids": tokens(2, 3), "past_key_values": cache})


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_a_decoder_in_another_precision_is_captured_with_its_cache(kind: torch.dtype, transformers: Any) -> None:
    model = decoder("Llama", transformers).to(kind)
    final = fxprune.finalize(traced_step(model, transformers))
    call = step(model, transformers.DynamicCache(), 3, 1, 6)
    with torch.no_grad():
        found = final(**call)
        assert near(found, model(**copy.deepcopy(call)))
    assert found.past_key_values.layers[0].keys.dtype is found.past_key_values.layers[0].dtype is kind


def test_gradient_checkpointing_that_was_left_on_changes_nothing(transformers: Any) -> None:
    model = decoder("Llama", transformers)
    model.activation_checkpointing_enable()  # type: ignore[operator]
    call = {"input_ids": (ids := tokens(2, 6)), "labels": ids, "use_cache": False}
    traced = fxprune.trace(model, call, modes=("train",))
    traced.train()(**call).loss.backward()
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    model.train()(**call).loss.backward()
    expected = [parameter.grad for parameter in model.parameters()]
    assert len(found) == len(expected)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found, expected, strict=True))


def test_a_cache_where_none_was_captured_is_refused(transformers: Any) -> None:
    model = decoder("Llama", transformers)
    traced = fxprune.trace(model, {"input_ids": tokens(2, 3)}, modes=("eval",))
    with pytest.raises(InputError, match="Not captured: past_key_values"):
        traced(input_ids=tokens(2, 3), past_key_values=transformers.DynamicCache())


def test_axes_that_stay_fixed_are_named_in_a_cache_too(transformers: Any) -> None:
    class Reader(nn.Module):
        def forward(self, cache: Any) -> torch.Tensor:
            keys: torch.Tensor = cache.layers[0].keys
            return keys + 1 if keys.shape[2] == 5 else keys

    cache = transformers.DynamicCache([(torch.randn(2, 4, 5, 3),) * 2])
    with pytest.raises(FxpruneError, match=r"axis 2 of input `cache\.key_cache\[0\]` \(n\) is fixed to 5"):
        fxprune.trace(Reader(), {"cache": cache}, dynamic_shapes={"cache": [[{2: Dim("n")}], [None]]})


def test_caches_come_back_from_files_where_transformers_is_there_and_are_named_where_not(
    transformers: Any, tmp_path: Path
) -> None:
    model = decoder("Llama", transformers)
    final = fxprune.finalize(traced_step(model, transformers))
    path = tmp_path / "decoder.fxp"
    fxprune.save(final, path)
    call = step(model, transformers.DynamicCache(), 3, 1, 5)
    loaded = fxprune.load(path)
    assert same(loaded(**call), final(**call))
    with torch.no_grad():
        assert near(fxprune.load(path, model).eval()(**call), model(**copy.deepcopy(call)))
    code = (
        "import sys, fxprune\n"
        "try:\n    fxprune.load(sys.argv[1])\n"
        "except fxprune.errors.ArtifactError as error:\n    assert 'import transformers' in str(error), error\n"
        "else:\n    raise AssertionError\n"
        "assert not any(name.startswith('transformers') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, path], check=True)


# ---- classes of the model's own


@dataclass
class Scores:
    """What a model returns."""

    logits: torch.Tensor
    loss: torch.Tensor | None = None


class Pair(NamedTuple):
    """What another one returns."""

    first: torch.Tensor
    second: torch.Tensor


class Returning(nn.Module):
    """A layer whose output comes in a class."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.inner, self.layer, self.kind = nn.Linear(3, 8), nn.Linear(8, 2), kind

    def forward(self, x: torch.Tensor) -> Any:
        y = self.layer(self.inner(x).relu())
        return self.kind(y, y.sum(-1)) if self.kind is Pair else self.kind(logits=y)


@pytest.mark.parametrize("kind", [Scores, Pair, "ModelOutput"])
def test_outputs_come_back_in_their_class_from_traced_finalized_and_loaded_modules(
    kind: Any, transformers: Any, tmp_path: Path
) -> None:
    if kind == "ModelOutput":
        kind = transformers.modeling_outputs.SequenceClassifierOutput
    model = Returning(kind)
    x = torch.randn(3, 3)
    traced = fxprune.trace(model, x)
    fxprune.prune.channels(traced, 0.5, round_to=1)
    final = fxprune.finalize(traced)
    fxprune.save(final, tmp_path / "model.fxp")
    for module in (traced, final, copy.deepcopy(final), fxprune.load(tmp_path / "model.fxp")):
        found = module(x)
        assert type(found) is kind
        assert torch.allclose(flat(found)[0], flat(traced(x))[0], atol=1e-6)
    assert getattr(traced(x), "loss", None) is None


def test_a_loss_is_computed_from_labels(transformers: Any) -> None:
    model = decoder("Llama", transformers)
    ids = tokens(2, 6)
    traced = fxprune.trace(model, {"input_ids": ids, "labels": ids, "use_cache": False})
    for mode in (True, False):
        model.train(mode), traced.train(mode)
        call = {"input_ids": (other := tokens(3, 6)), "labels": other, "use_cache": False}
        found, expected = traced(**call), model(**call)
        assert torch.equal(found.loss, expected.loss)
        assert type(found) is type(expected)
        assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    traced.train(), model.train()
    traced(**call).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


_FOREIGN = """
import sys

import torch

_operators = torch.library.Library("torchvision", "DEF")  # which a build of torchvision beside a CPU torch may lack
for name in ("nms", "qnms"):
    _operators.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")

import transformers
from transformers.integrations.executorch import register_dynamic_cache_export_support

import fxprune
from tests.decoders import STEP_SHAPES, decoder, step, tokens

register_dynamic_cache_export_support()
model = decoder("Llama", transformers)
sample = step(model, transformers.DynamicCache(), 2, 3, 4)
traced = fxprune.trace(model, sample, dynamic_shapes=STEP_SHAPES, modes=("eval",))
report = fxprune.export.to_onnx(fxprune.finalize(traced), sys.argv[1])
assert "past_key_values.1.value" in report.inputs, report.inputs
prompt = tokens(2, 4)
written = fxprune.export.generate(
    sys.argv[1], {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}, max_new_tokens=8
)
assert torch.equal(written, model.generate(prompt, do_sample=False, max_new_tokens=8))
"""


@pytest.mark.slow
def test_a_cache_that_the_library_itself_registered_is_written_to_onnx(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _FOREIGN, str(tmp_path / "decoder.onnx")],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
