"""The models of `benchmarks/libraries.py`: how each is built, with random weights, and what it is called with.

A small member of every family of timm that constructs without a download, models of diffusers and ultralytics; those of
transformers stand in `transformers_models.py`. Libraries are imported where a model of theirs is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers_models import TRANSFORMERS, build

Built: TypeAlias = "tuple[nn.Module, tuple[Any, ...], dict[str, Any]]"


@dataclass(frozen=True)
class Entry:
    """One model.

    Attributes:
        library, name: what it is called in the table.
        build: gives the model, the arguments and the keyword arguments of a call.
    """

    library: str
    name: str
    build: Callable[[], Built] = field(repr=False)


# ---- timm: name -> side of the image, options

TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "beit_base_patch16_224": (64, {"img_size": 64, "depth": 4, "embed_dim": 192, "num_heads": 3}),
    "botnet26t_256": (64, {"img_size": 64}),
    "mobileone_s0": (64, {}),
    "test_byobnet": (64, {}),
    "cait_xxs24_224": (64, {"img_size": 64, "depth": 6}),
    "coat_lite_tiny": (64, {"img_size": 64}),
    "convit_tiny": (64, {"img_size": 64, "depth": 6, "local_up_to_layer": 4}),
    "convmixer_768_32": (64, {}),
    "convnext_atto": (64, {}),
    "convnextv2_atto": (64, {}),
    "cpubone_nano": (64, {}),
    "crossvit_tiny_240": (240, {}),
    "csatv2": (128, {}),
    "cs3darknet_focus_s": (64, {}),
    "cspresnet50": (64, {}),
    "cspnext_tiny": (64, {}),
    "davit_tiny": (56, {}),
    "deepseek_vit_412m": (56, {"depth": 2, "embed_dim": 128, "num_heads": 2, "img_size": 56}),
    "deit_tiny_distilled_patch16_224": (64, {"img_size": 64, "depth": 6}),
    "deit3_small_patch16_224": (64, {"img_size": 64, "depth": 4}),
    "densenet121": (64, {}),
    "dla46_c": (64, {}),
    "dpn48b": (64, {}),
    "edgenext_xx_small": (64, {}),
    "efficientformer_l1": (224, {}),
    "efficientformerv2_s0": (224, {}),
    "efficientnet_b0": (64, {}),
    "mnasnet_small": (64, {}),
    "tf_efficientnetv2_b0": (64, {}),
    "efficientvim_m1": (64, {}),
    "efficientvit_b0": (64, {}),
    "efficientvit_m0": (224, {}),
    "eva02_tiny_patch14_224": (56, {"img_size": 56, "depth": 4}),
    "fasternet_t0": (64, {}),
    "fastvit_t8": (64, {}),
    "focalnet_tiny_srf": (64, {}),
    "gcvit_xxtiny": (224, {}),
    "gemma4_vit_167m": (64, {"depth": 2}),
    "ghostnet_050": (64, {}),
    "ghostnetv3_050": (64, {}),
    "hardcorenas_a": (64, {}),
    "hgnetv2_b0": (64, {}),
    "hiera_tiny_224": (224, {}),
    "sam2_hiera_tiny": (224, {}),
    "hrnet_w18_small": (64, {}),
    "iformer_t": (64, {}),
    "inception_next_atto": (64, {}),
    "inception_resnet_v2": (128, {}),
    "inception_v3": (128, {}),
    "inception_v4": (128, {}),
    "lcnetv2_small": (64, {}),
    "levit_128s": (224, {}),
    "lowformer_b0": (64, {}),
    "mambaout_femto": (64, {}),
    "coatnet_nano_rw_224": (224, {}),
    "maxvit_pico_rw_256": (64, {"img_size": 64}),
    "poolformer_s12": (64, {}),
    "caformer_s18": (64, {}),
    "mixer_s32_224": (64, {"img_size": 64}),
    "gmlp_ti16_224": (64, {"img_size": 64}),
    "resmlp_12_224": (64, {"img_size": 64}),
    "mobilenetv3_small_050": (64, {}),
    "mobilenetv4_conv_small": (64, {}),
    "mobilenetv5_300m": (128, {"channel_multiplier": 0.25}),
    "mobilevit_xxs": (64, {}),
    "mobilevitv2_050": (64, {}),
    "mvitv2_tiny": (64, {"img_size": 64}),
    "naflexvit_base_patch16_gap": (64, {"depth": 3}),
    "nasnetalarge": (64, {"num_features": 96, "stem_size": 8, "channel_multiplier": 2}),
    "nest_tiny": (64, {"img_size": 64}),
    "nextvit_small": (64, {}),
    "nf_regnet_b0": (64, {}),
    "dm_nfnet_f0": (64, {}),
    "test_nfnet": (64, {}),
    "pit_ti_224": (224, {}),
    "pnasnet5large": (64, {}),
    "pvt_v2_b0": (64, {}),
    "qwen3_vit_88m": (64, {"depth": 3}),
    "rdnet_tiny": (64, {}),
    "regnetx_002": (64, {}),
    "regnety_002": (64, {}),
    "repghostnet_050": (64, {}),
    "repvit_m1_0": (64, {}),
    "res2net50_26w_4s": (64, {}),
    "resnest14d": (64, {}),
    "resnet18": (64, {}),
    "resnet26t": (64, {}),
    "seresnet18": (64, {}),
    "resnetv2_18": (64, {}),
    "rexnet_100": (64, {}),
    "selecsls42b": (64, {}),
    "legacy_seresnet18": (64, {}),
    "sequencer2d_s": (64, {"layers": (1, 1, 2, 1)}),
    "shvit_s1": (64, {}),
    "skresnet18": (64, {}),
    "starnet_s050": (64, {}),
    "swiftformer_xs": (64, {}),
    "swin_tiny_patch4_window7_224": (56, {"img_size": 56, "window_size": 7}),
    "swinv2_tiny_window8_256": (64, {"img_size": 64}),
    "swinv2_cr_tiny_224": (64, {"img_size": 64, "window_size": 4}),
    "tiny_vit_5m_224": (224, {}),
    "tnt_s_patch16_224": (64, {"img_size": 64, "depth": 4}),
    "tresnet_m": (64, {}),
    "twins_svt_small": (224, {}),
    "twins_pcpvt_small": (224, {}),
    "vgg11_bn": (64, {}),
    "visformer_tiny": (64, {"img_size": 64}),
    "test_vit": (64, {"img_size": 64}),
    "vit_tiny_patch16_224": (64, {"img_size": 64, "depth": 6}),
    "vit_small_resnet26d_224": (64, {"img_size": 64, "depth": 4}),
    "vit_relpos_small_patch16_224": (64, {"img_size": 64, "depth": 4}),
    "samvit_base_patch16": (64, {"img_size": 64, "depth": 3, "global_attn_indexes": (2,)}),
    "vitamin_small_224": (64, {"img_size": 64, "depth": 4}),
    "volo_d1_224": (64, {"img_size": 64}),
    "ese_vovnet19b_slim": (64, {}),
    "legacy_xception": (64, {}),
    "xception41": (64, {}),
    "xcit_nano_12_p16_224": (64, {"img_size": 64}),
}


def _timm(name: str, side: int, options: dict[str, Any]) -> Built:
    import timm

    model = timm.create_model(name, pretrained=False, num_classes=10, **options)
    return model, (torch.randn(2, 3, side, side),), {}


# ---- ultralytics: the file that describes a model

ULTRALYTICS = (
    "yolov5n.yaml", "yolov8n.yaml", "yolov8n-cls.yaml", "yolov8n-seg.yaml", "yolov8n-pose.yaml", "yolov9t.yaml",
    "yolov10n.yaml", "yolo11n.yaml", "yolo12n.yaml", "yolov3-tiny.yaml", "yolov6n.yaml", "yolov8n-rtdetr.yaml",
)  # fmt: skip


def _ultralytics(name: str) -> Built:
    from ultralytics import YOLO
    from ultralytics.nn.tasks import RTDETRDetectionModel

    if "rtdetr" in name:
        # it sorts boxes by score: of few boxes and classes these lie further apart than rounding moves them
        return RTDETRDetectionModel(name, nc=2, verbose=False), (5 * torch.randn(2, 3, 32, 32),), {}
    return YOLO(name).model, (torch.randn(2, 3, 64, 64),), {}


# ---- diffusers: what builds a model, and its inputs


def _diffusers(name: str, config: Mapping[str, Any], inputs: Callable[[], dict[str, Any]]) -> Built:
    import diffusers

    return getattr(diffusers, name)(**config), (), inputs()


def _noisy(channels: int, side: int, **more: Tensor) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "sample": torch.randn(2, channels, side, side),
        "timestep": torch.tensor([1, 5]),
        **{key: value.clone() for key, value in more.items()},
        "return_dict": False,
    }


def _images(channels: int, side: int, name: str = "sample") -> Callable[[], dict[str, Any]]:
    return lambda: {name: torch.randn(2, channels, side, side), "return_dict": False}


_BLOCKS = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 16}
_AUTOENCODER = {
    "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 32,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip

DIFFUSERS: dict[str, tuple[str, Mapping[str, Any], Callable[[], dict[str, Any]]]] = {
    "UNet2DModel": (
        "UNet2DModel",
        _BLOCKS | {
            "in_channels": 3, "out_channels": 3, "attention_head_dim": 8,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        _noisy(3, 16),
    ),
    "UNet2DConditionModel": (
        "UNet2DConditionModel",
        _BLOCKS | {
            "cross_attention_dim": 32, "attention_head_dim": 8,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        _noisy(4, 16, encoder_hidden_states=torch.randn(2, 7, 32)),
    ),
    "UNet2DConditionModel, linear projections": (
        "UNet2DConditionModel",
        _BLOCKS | {
            "cross_attention_dim": 32, "attention_head_dim": 8, "use_linear_projection": True,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        },
        _noisy(4, 16, encoder_hidden_states=torch.randn(2, 7, 32)),
    ),
    "UNet1DModel": (
        "UNet1DModel",
        {
            "block_out_channels": (32, 32, 64), "in_channels": 14, "out_channels": 14, "sample_size": 32,
            "time_embedding_type": "positional", "use_timestep_embedding": True, "layers_per_block": 1,
            "down_block_types": ("DownResnetBlock1D",) * 3, "up_block_types": ("UpResnetBlock1D",) * 2,
            "mid_block_type": "MidResTemporalBlock1D", "out_block_type": "OutConv1DBlock", "act_fn": "swish",
        },
        lambda: {"sample": torch.randn(2, 14, 32), "timestep": torch.tensor([1, 5]), "return_dict": False},
    ),
    "AutoencoderKL": ("AutoencoderKL", _AUTOENCODER, _images(3, 32)),
    "VQModel": (
        "VQModel", _AUTOENCODER | {"num_vq_embeddings": 32, "latent_channels": 3}, _images(3, 32),
    ),
    "AutoencoderTiny": (
        "AutoencoderTiny",
        {
            "encoder_block_out_channels": (16, 16), "decoder_block_out_channels": (16, 16),
            "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1),
        },
        _images(3, 32),
    ),
    "AsymmetricAutoencoderKL": (
        "AsymmetricAutoencoderKL",
        {
            "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
            "down_block_out_channels": (32, 64), "up_block_out_channels": (32, 64), "norm_num_groups": 8,
            "sample_size": 32,
        },
        _images(3, 32),
    ),
    "ConsistencyDecoderVAE": (
        "ConsistencyDecoderVAE",
        {
            "encoder_block_out_channels": (32, 64), "encoder_down_block_types": ("DownEncoderBlock2D",) * 2,
            "decoder_add_attention": False, "decoder_block_out_channels": (32, 64),
            "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 2, "decoder_downsample_padding": 1,
            "decoder_in_channels": 7, "decoder_layers_per_block": 1, "decoder_norm_eps": 1e-5,
            "decoder_norm_num_groups": 8, "decoder_num_train_timesteps": 1024, "decoder_out_channels": 6,
            "decoder_resnet_time_scale_shift": "scale_shift", "decoder_time_embedding_type": "learned",
            "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 2, "encoder_norm_num_groups": 8,
            "encoder_act_fn": "silu", "encoder_layers_per_block": 1, "encoder_out_channels": 4, "latent_channels": 4,
        },
        _images(3, 32),
    ),
    "Transformer2DModel": (
        "Transformer2DModel",
        {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 32, "norm_num_groups": 8, "num_layers": 2},
        lambda: {"hidden_states": torch.randn(2, 32, 8, 8), "return_dict": False},
    ),
    "DiTTransformer2DModel": (
        "DiTTransformer2DModel",
        {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2,
         "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 100},
        lambda: {
            "hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([1, 5]),
            "class_labels": torch.tensor([3, 4]), "return_dict": False,
        },
    ),
    "PixArtTransformer2DModel": (
        "PixArtTransformer2DModel",
        {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2,
         "sample_size": 8, "patch_size": 2, "cross_attention_dim": 32, "caption_channels": 24,
         "use_additional_conditions": False},
        lambda: {
            "hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([1, 5]),
            "encoder_hidden_states": torch.randn(2, 7, 24),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, "return_dict": False,
        },
    ),
    "PriorTransformer": (
        "PriorTransformer",
        {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "embedding_dim": 24,
         "num_embeddings": 7, "additional_embeddings": 4},
        lambda: {
            "hidden_states": torch.randn(2, 24), "timestep": torch.tensor([1, 5]),
            "proj_embedding": torch.randn(2, 24), "encoder_hidden_states": torch.randn(2, 7, 24),
            "return_dict": False,
        },
    ),
    "SD3Transformer2DModel": (
        "SD3Transformer2DModel",
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 24, "caption_projection_dim": 32,
         "pooled_projection_dim": 20, "out_channels": 4, "pos_embed_max_size": 16},
        lambda: {
            "hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 7, 24),
            "pooled_projections": torch.randn(2, 20), "timestep": torch.tensor([1, 5]), "return_dict": False,
        },
    ),
    "UNet3DConditionModel": (
        "UNet3DConditionModel",
        _BLOCKS | {
            "cross_attention_dim": 32, "attention_head_dim": 8,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
        lambda: {
            "sample": torch.randn(2, 4, 3, 8, 8), "timestep": torch.tensor([1, 5]),
            "encoder_hidden_states": torch.randn(2, 7, 32), "return_dict": False,
        },
    ),
    "ControlNetModel": (
        "ControlNetModel",
        {
            "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 32,
            "attention_head_dim": 8, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "conditioning_embedding_out_channels": (16, 32),
        },
        lambda: {
            "sample": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([1, 5]),
            "encoder_hidden_states": torch.randn(2, 7, 32), "controlnet_cond": torch.randn(2, 3, 32, 32),
            "return_dict": False,
        },
    ),
    "T2IAdapter": (
        "T2IAdapter",
        {"in_channels": 3, "channels": [32, 64], "num_res_blocks": 2, "downscale_factor": 4,
         "adapter_type": "full_adapter"},
        lambda: {"x": torch.randn(2, 3, 32, 32)},
    ),
    "FluxTransformer2DModel": (
        "FluxTransformer2DModel",
        {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32,
         "axes_dims_rope": (4, 4, 8)},
        lambda: {
            "hidden_states": torch.randn(2, 16, 4), "encoder_hidden_states": torch.randn(2, 7, 32),
            "pooled_projections": torch.randn(2, 32), "timestep": torch.tensor([0.1, 0.5]),
            "img_ids": torch.arange(48).view(16, 3) % 4, "txt_ids": torch.zeros(7, 3), "return_dict": False,
        },
    ),
    "UVit2DModel": (
        "UVit2DModel",
        {"hidden_size": 32, "cond_embed_dim": 32, "micro_cond_encode_dim": 16, "micro_cond_embed_dim": 96,
         "encoder_hidden_size": 32, "vocab_size": 32, "codebook_size": 32, "in_channels": 32, "block_out_channels": 32,
         "num_res_blocks": 1, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
         "block_num_heads": 2, "sample_size": 8, "downsample": True, "upsample": True},
        lambda: {
            "input_ids": torch.randint(0, 32, (2, 8, 8)), "encoder_hidden_states": torch.randn(2, 7, 32),
            "pooled_text_emb": torch.randn(2, 32), "micro_conds": torch.randn(2, 6),
        },
    ),
    "SanaTransformer2DModel": (
        "SanaTransformer2DModel",
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
         "num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32,
         "caption_channels": 24, "sample_size": 8, "patch_size": 1},
        lambda: {
            "hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 7, 24),
            "timestep": torch.tensor([1, 5]), "return_dict": False,
        },
    ),
    "AutoencoderDC": (
        "AutoencoderDC",
        {"latent_channels": 4, "attention_head_dim": 8, "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
         "decoder_block_types": ("ResBlock", "EfficientViTBlock"), "encoder_block_out_channels": (16, 32),
         "decoder_block_out_channels": (16, 32), "encoder_qkv_multiscales": ((), (5,)),
         "decoder_qkv_multiscales": ((), (5,)), "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1),
         "downsample_block_type": "conv", "upsample_block_type": "interpolate",
         "decoder_norm_types": "rms_norm", "decoder_act_fns": "silu"},
        lambda: {"sample": torch.randn(2, 3, 16, 16), "return_dict": False},
    ),
}  # fmt: skip


def entries() -> dict[str, Entry]:
    """All models by their names, "library/name"."""
    found = [Entry("timm", name, lambda name=name, row=row: _timm(name, *row)) for name, row in TIMM.items()]
    found += [Entry("transformers", name, lambda name=name: build(name)) for name in TRANSFORMERS]
    found += [Entry("ultralytics", name, lambda name=name: _ultralytics(name)) for name in ULTRALYTICS]
    found += [Entry("diffusers", name, lambda row=row: _diffusers(*row)) for name, row in DIFFUSERS.items()]
    return {f"{entry.library}/{entry.name}": entry for entry in found}
