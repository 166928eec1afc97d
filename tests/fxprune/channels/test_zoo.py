"""Removal on real architectures with random weights: exact, and as small as the masks allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.nn.utils import prune

import fxprune
from fxprune.channels import ChannelPlan, analyze, remove
from tests.fxprune.channels.exactness import error

SMALL = ("resnet20_cifar10", "nin_cifar10")
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
# MACs left with half of every layer's rows zeroed, weights only
LEFT = {
    "resnet18": 0.48, "resnet50": 0.42, "bn_vgg16": 0.27, "mobilenet_w1": 0.165, "mobilenetv2_w1": 0.32,
    "densenet121": 0.28,
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


def repeated(inputs: Any, batch: int) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: torch.cat([t] * batch)[:batch], inputs)


def check(model: nn.Module, kwargs: dict[str, Any], args: tuple[Any, ...] = ()) -> ChannelPlan:
    args, kwargs = pytree.tree_map_only(
        torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, (args, kwargs)
    )
    traced = fxprune.trace(model, args, kwargs, modes=("eval",))
    plan = analyze(traced, align=1)
    remove(traced, plan)
    for batch in (1, 3):
        again_args, again = repeated(args, batch), repeated(kwargs, batch)
        with torch.no_grad():
            expected = model(*again_args, **again)
            assert error(dict(expected) if hasattr(expected, "keys") else expected, traced(*again_args, **again)) < 1e-9
    return plan


@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES)])
def test_a_convolutional_family_is_shrunk_exactly(name: str, pytorchcv_model: Callable[..., nn.Module]) -> None:
    model = prepare(pytorchcv_model(name))
    plan = check(model, {}, (torch.randn(2, 3, *getattr(model, "in_size", (224, 224))),))
    assert plan.macs[1] <= LEFT.get(name, 1.0) * plan.macs[0]


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


def transformer(name: str, transformers: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A small one of an architecture with random weights and biases, and its inputs."""
    config, shapes = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config))
    if name == "Wav2Vec2":
        for module in model.modules():
            if nn.utils.parametrize.is_parametrized(module):
                nn.utils.parametrize.remove_parametrizations(module, "weight")
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.3)
    return model, {k: torch.randint(3, 90, s) if "ids" in k else torch.randn(s) for k, s in shapes.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore")
def test_a_transformer_is_shrunk_exactly(name: str, transformers: Any) -> None:
    model, inputs = transformer(name, transformers)
    plan = check(prepare(model), inputs)
    assert plan.parameters[1] < plan.parameters[0]
