"""A pipeline from text to images whose text encoder, UNet and decoder are pruned draws what the masked ones do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fxprune
from tests.libraries.conftest import settled, with_masks

# what a library warns of is its own
pytestmark = pytest.mark.filterwarnings("ignore")


def tokenizer(transformers: Any) -> Any:
    """A tokenizer of whole words that is in no file."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<start>", "<end>", "<unk>", "a", "red", "blue", "cat", "house", "on", "the", "hill"]
    rules = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    rules.post_processor = processors.TemplateProcessing(
        "<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    marks = {"bos_token": "<start>", "eos_token": "<end>", "unk_token": "<unk>", "pad_token": "<end>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=rules, model_max_length=10, **marks)


def parts(diffusers: Any, transformers: Any) -> dict[str, Any]:
    """The networks of a pipeline, with random weights."""
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(
        vocab_size=20, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=10, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    sizes = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
    crossing = {"cross_attention_dim": 32, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4}
    places = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    coded = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return {
        "text_encoder": settled(transformers.CLIPTextModel(text)),
        "unet": settled(diffusers.UNet2DConditionModel(sample_size=8, **sizes, **crossing, **places)),
        "vae": settled(diffusers.AutoencoderKL(sample_size=16, latent_channels=4, **sizes, **coded)),
    }


SAMPLES: dict[str, dict[str, Any]] = {
    "text_encoder": {"input_ids": torch.randint(3, 11, (2, 10))},
    "unet": {
        "sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(7), "encoder_hidden_states": torch.randn(2, 10, 32),
    },
    "vae": {"sample": torch.randn(2, 4, 8, 8)},
}  # fmt: skip


def masked_and_small(name: str, model: Any, folder: Path) -> tuple[Any, Any]:
    """A network with zeros where masks are, and the one of its class that is smaller by these; through a file."""
    traced = fxprune.trace(model, SAMPLES[name], modes=("eval",))
    report = fxprune.prune.channels(traced, macs=0.8, runnable=model)
    assert report.macs[1] <= 0.8 * report.macs[0]
    fxprune.save(fxprune.finalize(traced), folder / name)
    small = fxprune.write_back(fxprune.load(folder / name), model)
    assert type(small) is type(model)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    return with_masks(traced, model), small


def test_pruned_networks_draw_from_text_what_the_masked_ones_draw(
    diffusers: Any, transformers: Any, tmp_path: Path
) -> None:
    dense = parts(diffusers, transformers)
    pairs = {name: masked_and_small(name, dense[name], tmp_path) for name in ("text_encoder", "unet")}
    decoders = masked_and_small("vae", dense["vae"].decoder, tmp_path)  # a pipeline from text calls it alone
    pairs["vae"] = copy.deepcopy(dense["vae"]), copy.deepcopy(dense["vae"])
    for vae, decoder in zip(pairs["vae"], decoders, strict=True):
        vae.decoder = decoder

    def drawn(networks: dict[str, Any]) -> Any:
        pipeline = diffusers.StableDiffusionPipeline(
            **networks, tokenizer=tokenizer(transformers), scheduler=diffusers.DDIMScheduler(num_train_timesteps=20),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        start = torch.Generator().manual_seed(0)
        prompts = ["a red cat on the hill", "a blue house"]
        call = pipeline(prompts, num_inference_steps=4, guidance_scale=3.0, generator=start, output_type="np")
        return call.images

    small = drawn({name: pair[1] for name, pair in pairs.items()})
    assert small.shape == (2, 16, 16, 3)
    assert small.std() > 1e-2
    np.testing.assert_allclose(small, drawn({name: pair[0] for name, pair in pairs.items()}), atol=1e-4)
    assert np.abs(small - drawn(dense)).max() > 1e-3
