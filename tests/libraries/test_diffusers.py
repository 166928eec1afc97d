"""Models of diffusers, pruned, go on in diffusers: pipelines denoise with them, configurations say their sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fxprune
from fxprune.errors import ConfigurationWarning
from tests.libraries.conftest import settled, with_masks

# what a library warns of is its own
pytestmark = pytest.mark.filterwarnings("ignore")


def unet(diffusers: Any) -> Any:
    return settled(
        diffusers.UNet2DModel(
            sample_size=16,
            block_out_channels=(32, 64),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    )


def test_a_pipeline_denoises_with_a_pruned_unet(diffusers: Any, tmp_path: Path) -> None:
    model = unet(diffusers)
    inputs = {"sample": torch.randn(2, 3, 16, 16), "timestep": torch.tensor([1, 5])}
    traced = fxprune.trace(model, (), inputs, modes=("eval",))
    report = fxprune.prune.channels(traced, macs=0.7, runnable=model)
    assert report.macs[1] <= 0.7 * report.macs[0]
    final = fxprune.finalize(traced)
    with pytest.warns(ConfigurationWarning, match=r"UNet2DModel.*fxprune.save\(final, path\)"):
        small = fxprune.write_back(final, model)
    assert type(small) is type(model)
    assert small.num_parameters() < 0.8 * model.num_parameters()

    def denoised(network: Any) -> Any:
        scheduler = diffusers.DDIMScheduler(num_train_timesteps=20)
        pipeline = diffusers.DDIMPipeline(unet=network, scheduler=scheduler)
        pipeline.set_progress_bar_config(disable=True)
        start = torch.Generator().manual_seed(0)
        return pipeline(batch_size=2, num_inference_steps=4, generator=start, output_type="np").images

    np.testing.assert_allclose(denoised(small), denoised(with_masks(traced, model)), atol=1e-4)
    assert np.abs(denoised(small) - denoised(model)).max() > 1e-3

    # one line stores it, and one restores it
    fxprune.save(final, tmp_path / "small.fxp")
    again = fxprune.write_back(fxprune.load(tmp_path / "small.fxp"), model)
    np.testing.assert_array_equal(denoised(again), denoised(small))


def test_an_autoencoder_goes_through_save_pretrained_where_its_configuration_says_the_sizes(
    diffusers: Any, tmp_path: Path
) -> None:
    widths = {"encoder_block_out_channels": (16, 16), "decoder_block_out_channels": (16, 16)}
    model = settled(diffusers.AutoencoderTiny(**widths, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)))
    x = torch.randn(2, 3, 32, 32)
    traced = fxprune.trace(model, x, modes=("eval",))
    fxprune.prune.channels(traced, 0.25, scope="local", round_to=1, runnable=model)
    small = fxprune.write_back(fxprune.finalize(traced), model)
    assert small.config.encoder_block_out_channels == (12, 12)
    assert model.config.encoder_block_out_channels == (16, 16)
    small.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x).sample, traced(x).sample)
