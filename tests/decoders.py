"""Small decoders of the transformers library with random weights, their caches and their inputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.export import Dim

import fxprune
from tests.architectures import CAUSAL, FFN, PARTS

FREE = {0: Dim.AUTO, 1: Dim.AUTO}
FREE_CACHE = {0: Dim.AUTO, 2: Dim.AUTO}
_CAUSAL = {**CAUSAL, "use_cache": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SEQ2SEQ = {**PARTS, **FFN, "use_cache": True, "pad_token_id": 0}
DECODERS: dict[str, dict[str, Any]] = {
    "Llama": _CAUSAL,
    "Mistral": {**_CAUSAL, "sliding_window": 6},
    "Qwen2": _CAUSAL,
    "Gemma2": {**_CAUSAL, "head_dim": 8, "sliding_window": 6},
    "Phi3": _CAUSAL,
    "GPT2": {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
}
ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "T5": {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    "Bart": _SEQ2SEQ,
    "Whisper": {**_SEQ2SEQ, "num_mel_bins": 16, "max_source_positions": 20, "bos_token_id": 1, "eos_token_id": 2,
                "decoder_start_token_id": 1},
}  # fmt: skip


def decoder(name: str, transformers: Any, scale: float = 3.0) -> nn.Module:
    """A small one, in eval mode; larger weights than the library's make its greedy tokens differ."""
    if name in DECODERS:
        config, kind = DECODERS[name], "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    else:
        config, kind = ENCODER_DECODERS[name], "ForConditionalGeneration"
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, name + kind)(getattr(transformers, f"{name}Config")(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model.eval()


def tokens(batch: int, length: int) -> torch.Tensor:
    """Random identifiers."""
    return torch.randint(3, 90, (batch, length))


def filled(model: nn.Module, cache: Any, batch: int, length: int) -> Any:
    """The cache after the model has read some identifiers; as it is where there are none to read."""
    if length:
        with torch.no_grad():
            model(input_ids=tokens(batch, length), past_key_values=cache)
    return cache


def step(model: nn.Module, cache: Any, batch: int, length: int, past: int) -> dict[str, Any]:
    """The inputs of a step over a cache of `past` entries, the first row of them padded on the left."""
    mask = torch.ones(batch, past + length, dtype=torch.long)
    if batch > 1 and past > 1:
        mask[0, 0] = 0
    return {
        "input_ids": tokens(batch, length),
        "attention_mask": mask,
        "position_ids": torch.arange(past, past + length)[None].repeat(batch, 1),
        "past_key_values": filled(model, cache, batch, past),
    }


STEP_SHAPES = {"input_ids": FREE, "attention_mask": FREE, "position_ids": FREE, "past_key_values": FREE_CACHE}


def traced_step(model: nn.Module, transformers: Any) -> fxprune.TracedModule:
    """A decoder, traced for steps of any length over caches of any length."""
    sample = step(model, transformers.DynamicCache(), 2, 3, 4)
    return fxprune.trace(model, sample, dynamic_shapes=STEP_SHAPES, modes=("eval",))


def encoder_inputs(name: str, batch: int, length: int) -> dict[str, torch.Tensor]:
    """What the encoder reads, by name."""
    return {"input_features": torch.randn(batch, 16, 40)} if name == "Whisper" else {"input_ids": tokens(batch, length)}


def encoder_shapes(name: str) -> dict[str, Any]:
    """The free axes of `encoder_inputs`."""
    return {"input_features": {0: Dim.AUTO}} if name == "Whisper" else {"input_ids": FREE}


def flat(outputs: Any) -> list[torch.Tensor]:
    """The tensors and numbers of an output, as tensors."""
    return [torch.as_tensor(leaf) for leaf in pytree.tree_leaves(outputs) if leaf is not None]


def same(one: Any, other: Any) -> bool:
    """Whether two outputs are equal bit for bit, in the same classes."""
    pairs = list(zip(flat(one), flat(other), strict=True))
    return type(one) is type(other) and all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def near(one: Any, other: Any) -> bool:
    """Whether two outputs of one class are equal but for rounding: eager leaves out a mask that hides nothing."""
    pairs = list(zip(flat(one), flat(other), strict=True))
    return type(one) is type(other) and all(
        a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5) for a, b in pairs
    )
