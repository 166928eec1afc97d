"""Exported decoders write the tokens in onnxruntime that eager transformers writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import ArgumentError, ArgumentTypeError, CompareError
from tests.decoders import (
    DECODERS,
    ENCODER_DECODERS,
    FREE,
    FREE_CACHE,
    STEP_SHAPES,
    decoder,
    encoder_inputs,
    encoder_shapes,
    step,
    tokens,
)
from tests.slow import slow

STEPS = 64


@pytest.mark.parametrize("name", slow(DECODERS, DECODERS.keys() - {"Llama"}))
def test_64_greedy_tokens_are_eagers_with_and_without_padding(name: str, transformers: Any, tmp_path: Path) -> None:
    model = decoder(name, transformers)
    sample = step(model, transformers.DynamicCache(), 2, 3, 4)
    traced = fxprune.trace(model, sample, dynamic_shapes=STEP_SHAPES, modes=("eval",))
    path = tmp_path / "decoder.onnx"
    report = fxprune.export.to_onnx(traced, path)
    assert set(report.inputs) == {"input_ids", "attention_mask", "position_ids", *_cached("past_key_values")}
    assert set(report.outputs) == {"logits", *_cached("present")}
    for batch in (1, 3):
        ids = tokens(batch, 5)
        mask = torch.ones_like(ids)
        mask[1:, :2] = 0
        expected = _eager(model, {"input_ids": ids, "attention_mask": mask})
        found = fxprune.export.generate(path, {"input_ids": ids, "attention_mask": mask}, max_new_tokens=STEPS)
        assert torch.equal(found, expected)
    end = int(expected[0, 7])  # what a sequence writes third ends it
    ended = fxprune.export.generate(path, ids[:1], max_new_tokens=STEPS, eos_token_id=end, pad_token_id=0)
    first = fxprune.export.generate(path, ids[:1], max_new_tokens=STEPS)[0].tolist()
    assert ended[0].tolist() == first[: first.index(end, 5) + 1] if end in first[5:] else first


def test_a_cache_has_the_key_value_heads_that_pruning_leaves(transformers: Any, tmp_path: Path) -> None:
    model = decoder("Llama", transformers)
    ids = tokens(2, 6)
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    shapes = {"input_ids": FREE, "attention_mask": FREE, "use_cache": None}
    traced = fxprune.trace(model, sample, dynamic_shapes=shapes, modes=("eval",))
    fxprune.prune.channels(traced, 0.5, kinds="key-value group", round_to=1)
    small: Any = fxprune.write_back(fxprune.finalize(traced), model)
    inputs = step(small, transformers.DynamicCache(), 2, 3, 4)
    assert [layer.keys.shape[1] for layer in inputs["past_key_values"].layers] == [1, 1]
    captured = fxprune.trace(small, inputs, dynamic_shapes=STEP_SHAPES, modes=("eval",))
    fxprune.export.to_onnx(captured, path := tmp_path / "small.onnx")
    assert fxprune.export.Session(path).shapes["past_key_values.0.key"][1] == 1
    prompt = tokens(3, 5)
    expected = _eager(small, {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}, steps=16)
    assert torch.equal(fxprune.export.generate(path, prompt, max_new_tokens=16), expected)


def test_a_program_takes_and_returns_caches(transformers: Any, tmp_path: Path) -> None:
    model = decoder("GPT2", transformers)
    sample = step(model, transformers.DynamicCache(), 2, 3, 4)
    traced = fxprune.trace(model, sample, dynamic_shapes=STEP_SHAPES, modes=("eval",))
    report = fxprune.export.to_program(traced, path := tmp_path / "decoder.pt2")
    assert report.comparison
    assert fxprune.compare(traced, path, inputs=step(model, transformers.DynamicCache(), 3, 1, 5)).ok


def _cached(prefix: str) -> list[str]:
    return [f"{prefix}.{layer}.{part}" for layer in range(2) for part in ("key", "value")]


def _eager(model: Any, inputs: dict[str, torch.Tensor], steps: int = STEPS) -> torch.Tensor:
    model.generation_config.eos_token_id = None
    found: torch.Tensor = model.generate(**inputs, do_sample=False, max_new_tokens=steps, pad_token_id=0)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_an_encoder_decoder_runs_from_two_files(name: str, transformers: Any, tmp_path: Path) -> None:
    model = decoder(name, transformers)
    first, later = tmp_path / "first.onnx", tmp_path / "later.onnx"
    inputs = encoder_inputs(name, 2, 12) | {"decoder_input_ids": tokens(2, 5)}
    shapes: dict[str, Any] = encoder_shapes(name) | {"decoder_input_ids": FREE}
    fxprune.export.to_onnx(fxprune.trace(model, inputs, dynamic_shapes=shapes, modes=("eval",)), first)
    with torch.no_grad():
        outputs = model(**inputs)
    states = transformers.modeling_outputs.BaseModelOutput(outputs.encoder_last_hidden_state)
    inputs = {
        "encoder_outputs": states,
        "decoder_input_ids": tokens(2, 2),
        "past_key_values": outputs.past_key_values,
    }
    shapes = {"encoder_outputs": [FREE], "decoder_input_ids": FREE, "past_key_values": FREE_CACHE}
    report = fxprune.export.to_onnx(fxprune.trace(model, inputs, dynamic_shapes=shapes, modes=("eval",)), later)
    assert {"past_key_values.0.decoder.key", "past_key_values.1.encoder.value"} < set(report.inputs)
    assert {"present.0.decoder.key", "present.1.encoder.value"} < set(report.outputs)
    for batch in (1, 3):
        given = encoder_inputs(name, batch, 9) | {"decoder_input_ids": tokens(batch, 1)}
        found = fxprune.export.generate(later, given, prefill=first, max_new_tokens=STEPS)
        assert torch.equal(found, _eager_loop(model, given, transformers))


@torch.no_grad()
def _eager_loop(model: nn.Module, inputs: dict[str, torch.Tensor], transformers: Any) -> torch.Tensor:
    """What the library's own search takes for a prompt of the decoder differs by model; the steps do not."""
    found, outputs = inputs["decoder_input_ids"], model(**inputs)
    for _ in range(STEPS):
        found = torch.cat([found, outputs.logits[:, -1:].argmax(-1)], dim=1)
        states = transformers.modeling_outputs.BaseModelOutput(outputs.encoder_last_hidden_state)
        outputs = model(
            encoder_outputs=states, decoder_input_ids=found[:, -1:], past_key_values=outputs.past_key_values
        )
    return found


class Cacheless(nn.Module):
    """Scores of identifiers, without a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 9)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.table(input_ids)}


def test_files_and_inputs_that_cannot_be_generated_from_are_named(tmp_path: Path) -> None:
    path = tmp_path / "table.onnx"
    fxprune.export.to_onnx(fxprune.trace(Cacheless(), {"input_ids": torch.ones(2, 3, dtype=torch.long)}), path)
    with pytest.raises(ArgumentError, match="takes no cache: its inputs are input_ids"):
        fxprune.export.generate(path, torch.ones(1, 2, dtype=torch.long))
    with pytest.raises(ArgumentTypeError, match="max_new_tokens=-1"):
        fxprune.export.generate(path, torch.ones(1, 2, dtype=torch.long), max_new_tokens=-1)
    with pytest.raises(CompareError, match="nothing of that name"):
        fxprune.export.generate(tmp_path / "absent.onnx", torch.ones(1, 2, dtype=torch.long))


class Keeper(nn.Module):
    """A decoder by hand, whose cache is a dict: names alone make it one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def forward(self, input_ids: torch.Tensor, extra: torch.Tensor, past: torch.Tensor) -> dict[str, torch.Tensor]:
        keys = torch.cat([past, self.table(input_ids)[:, None]], dim=2)
        return {"logits": keys.sum(1).cumsum(1) + extra, "key": keys}


def test_inputs_that_are_missing_or_cannot_be_empty_are_named(tmp_path: Path) -> None:
    path = tmp_path / "keeper.onnx"
    sample = {
        "input_ids": torch.ones(2, 3, dtype=torch.long),
        "extra": torch.ones(1),
        "past": torch.ones(2, 1, 5, 4),
    }
    names = {
        "input_names": ["input_ids", "extra", "past_key_values.0.key"],
        "output_names": ["logits", "present.0.key"],
    }
    fxprune.export.to_onnx(fxprune.trace(Keeper(), sample), path, **names)  # type: ignore[arg-type]
    ids = torch.ones(1, 2, dtype=torch.long)
    with pytest.raises(ArgumentError, match="takes 'extra', which was not given"):
        fxprune.export.generate(path, ids)
    with pytest.raises(CompareError, match="axis 2, the entries so far, is not free"):
        fxprune.export.generate(path, {"input_ids": ids, "extra": torch.ones(1)})
    with pytest.raises(ArgumentTypeError, match=r"input_ids of shape \(batch, length\); given were \[2\]"):
        fxprune.export.generate(path, ids[0])
