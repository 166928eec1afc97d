"""Public architectures that tests and benchmarks build, and how their layers are masked."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

FAMILIES = (
    "resnet18", "resnet50", "bn_vgg16", "mobilenet_w1", "mobilenetv2_w1", "densenet121", "preresnet18",
    "resnext50_32x4d", "seresnet18", "senet16", "resnetd50b", "resnesta18", "sknet50", "dpn68",
    "squeezenet_v1_0", "squeezeresnet_v1_0", "shufflenet_g2_w1", "shufflenetv2_w1", "shufflenetv2b_w1",
    "menet108_8x1_g3", "mnasnet_b1", "igcv3_w1", "ghostnet", "mobilenetv3_large_w1", "efficientnet_b0",
    "efficientnet_b0b", "darknet53", "darknet_ref", "alexnet", "zfnet", "peleenet", "inceptionv3",
    "inceptionv4", "inceptionresnetv2", "xception", "hrnet_w18_small_v1", "vovnet27s", "selecsls42b", "dla34",
    "fbnet_cb", "regnetx002", "regnety002", "wrn50_2", "drnc26", "airnet50_1x64d_r2", "bam_resnet18",
    "cbam_resnet18", "diracnet18v2", "condensenet74_c4_g4", "proxylessnas_cpu", "spnasnet", "hardnet39ds",
    "dicenet_wd5", "ibn_resnet50", "ibnb_resnet50", "scnet50", "bninception", "fishnet99", "espnetv2_wd2",
)  # fmt: skip

WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
PARTS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
FFN = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "use_cache": False, "vocab_size": 99, "d_model": 32}
TEXT = {"vocab_size": 99, **WIDE}
CAUSAL = {**TEXT, "num_key_value_heads": 2, "use_cache": False}
AUDIO = {
    "vocab_size": 32, "conv_dim": (16, 16, 16), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3),
    "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, **WIDE,
}  # fmt: skip
IDS, PICTURE = {"input_ids": (2, 12)}, {"pixel_values": (2, 3, 32, 32)}
SEQUENCES = {**IDS, "decoder_input_ids": (2, 8)}
ARCHITECTURES: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "Bert": (TEXT, IDS),
    "DistilBert": ({"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}, IDS),
    "Albert": ({**TEXT, "embedding_size": 16}, IDS),
    "GPT2": ({"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "use_cache": False,
              "bos_token_id": 1, "eos_token_id": 2}, IDS),
    "Llama": (CAUSAL, IDS),
    "Gemma": ({**CAUSAL, "head_dim": 8}, IDS),
    "GPTNeoX": ({**TEXT, "use_cache": False}, IDS),
    "T5": ({"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
            "use_cache": False}, SEQUENCES),
    "Bart": ({**PARTS, **FFN}, SEQUENCES),
    "Whisper": ({**PARTS, **FFN, "num_mel_bins": 16, "max_source_positions": 20, "pad_token_id": 0, "bos_token_id": 1,
                 "eos_token_id": 2, "decoder_start_token_id": 1},
                {"input_features": (2, 16, 40), "decoder_input_ids": (2, 8)}),
    "ViT": ({"image_size": 32, "patch_size": 8, **WIDE}, PICTURE),
    "Swin": ({"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
              "window_size": 4}, PICTURE),
    "ConvNext": ({"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}, {"pixel_values": (2, 3, 64, 64)}),
    "Segformer": ({"hidden_sizes": [8, 16, 32, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 4, 4]},
                  {"pixel_values": (2, 3, 64, 64)}),
    "CLIP": ({"text_config": {**TEXT, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0},
              "vision_config": {"image_size": 32, "patch_size": 8, **WIDE}, "projection_dim": 16}, {**IDS, **PICTURE}),
    "Wav2Vec2": (AUDIO, {"input_values": (2, 800)}),
    "Dinov2": ({"image_size": 32, "patch_size": 8, **WIDE}, PICTURE),
    "DebertaV2": (TEXT, IDS),
}  # fmt: skip


def prepare(model: nn.Module) -> nn.Module:
    """Random statistics, and half of the rows of every layer zeroed as `ln_structured` does."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
    for module in model.modules():
        turned = type(module).__name__ == "Conv1D"  # GPT-2's linear layer
        if (isinstance(module, nn.Conv2d | nn.Conv1d | nn.Linear) or turned) and module.weight.shape[0] > 1:
            prune.ln_structured(module, "weight", 0.5, n=2, dim=int(turned))
            prune.remove(module, "weight")
    return model.double().eval()


def plain_transformer(name: str, transformers: Any) -> nn.Module:
    """A small one of an architecture, initialized as the package does; without parametrizations."""
    config, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config))
    if name == "Wav2Vec2":
        for module in model.modules():
            if nn.utils.parametrize.is_parametrized(module):
                nn.utils.parametrize.remove_parametrizations(module, "weight")
    return model


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    """Random inputs of an architecture by name: identifiers in [3, 90), all else normal."""
    _, shapes = ARCHITECTURES[name]
    return {k: torch.randint(3, 90, s) if "ids" in k else torch.randn(s) for k, s in shapes.items()}


def transformer(name: str, transformers: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A small one of an architecture with random weights and biases, and its inputs."""
    model = plain_transformer(name, transformers)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.3)
    return model, inputs_of(name)
