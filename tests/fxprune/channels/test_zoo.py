"""Removal on real architectures with random weights: exact, and as small as the masks allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

import fxprune
from fxprune.channels import ChannelPlan, analyze, remove
from tests.architectures import ARCHITECTURES, FAMILIES, prepare, transformer
from tests.fxprune.channels.exactness import EXACT, count, error

SMALL = ("resnet20_cifar10", "nin_cifar10")
# parameters and MACs left with half of every layer's rows zeroed, weights only: what was measured, rounded up
LEFT = {
    "resnet20_cifar10": (0.48, 0.495), "nin_cifar10": (0.26, 0.27), "resnet18": (0.47, 0.47), "resnet50": (0.47, 0.415),
    "bn_vgg16": (0.26, 0.26), "mobilenet_w1": (0.19, 0.08), "mobilenetv2_w1": (0.33, 0.22),
    "densenet121": (0.295, 0.27), "preresnet18": (0.47, 0.47), "resnext50_32x4d": (0.745, 0.79),
    "seresnet18": (0.52, 0.54), "senet16": (0.76, 0.63), "resnetd50b": (0.47, 0.415), "resnesta18": (0.55, 0.53),
    "sknet50": (0.845, 0.87), "dpn68": (0.61, 0.635), "squeezenet_v1_0": (0.36, 0.33),
    "squeezeresnet_v1_0": (0.53, 0.44), "shufflenet_g2_w1": (0.725, 0.515), "shufflenetv2_w1": (0.435, 0.33),
    "shufflenetv2b_w1": (0.44, 0.32), "menet108_8x1_g3": (0.985, 0.905), "mnasnet_b1": (0.31, 0.215),
    "igcv3_w1": (0.45, 0.435), "ghostnet": (0.446, 0.655), "mobilenetv3_large_w1": (0.435, 0.48),
    "efficientnet_b0": (0.555, 0.615), "efficientnet_b0b": (0.555, 0.615), "darknet53": (0.58, 0.555),
    "darknet_ref": (0.29, 0.295), "alexnet": (0.28, 0.655), "zfnet": (0.28, 0.665), "peleenet": (0.325, 0.275),
    "inceptionv3": (0.28, 0.26), "inceptionv4": (0.265, 0.26), "inceptionresnetv2": (0.46, 0.42),
    "xception": (0.215, 0.205), "hrnet_w18_small_v1": (0.615, 0.59), "vovnet27s": (0.3, 0.27),
    "selecsls42b": (0.265, 0.26), "dla34": (0.43, 0.44), "fbnet_cb": (0.33, 0.24), "regnetx002": (0.89, 0.79),
    "regnety002": (0.88, 0.83), "wrn50_2": (0.365, 0.35), "drnc26": (0.385, 0.39), "airnet50_1x64d_r2": (0.48, 0.44),
    "bam_resnet18": (0.485, 0.515), "cbam_resnet18": (0.535, 0.55), "diracnet18v2": (0.265, 0.27),
    "condensenet74_c4_g4": (0.235, 0.025), "proxylessnas_cpu": (0.315, 0.22), "spnasnet": (0.31, 0.23),
    "hardnet39ds": (0.265, 0.16), "dicenet_wd5": (0.54, 0.95), "ibn_resnet50": (0.47, 0.42),
    "ibnb_resnet50": (0.47, 0.42), "scnet50": (0.635, 0.6), "bninception": (0.28, 0.275), "fishnet99": (0.41, 0.395),
    "espnetv2_wd2": (0.575, 0.915),
    "Bert": (0.885, 0.76), "DistilBert": (0.875, 0.74), "Albert": (0.9, 0.785), "GPT2": (0.855, 0.655),
    "Llama": (0.545, 0.495), "Gemma": (0.545, 0.495), "GPTNeoX": (0.785, 0.76), "T5": (0.7, 0.685),
    "Bart": (0.92, 0.795), "Whisper": (0.825, 0.75), "ViT": (0.815, 0.81), "Swin": (0.685, 0.685),
    "ConvNext": (0.685, 0.73), "Segformer": (0.81, 0.75), "CLIP": (0.82, 0.8), "Wav2Vec2": (0.76, 0.795),
    "Dinov2": (0.74, 0.745), "DebertaV2": (0.885, 0.76),
}  # fmt: skip


def repeated(inputs: Any, batch: int) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: torch.cat([t] * batch)[:batch], inputs)


def check(model: nn.Module, kwargs: dict[str, Any], args: tuple[Any, ...] = ()) -> ChannelPlan:
    args, kwargs = pytree.tree_map_only(
        torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, (args, kwargs)
    )
    traced = fxprune.trace(model, args, kwargs, modes=("eval",))
    plan = remove(traced, analyze(traced, align=1))
    for batch in (1, 3):
        again_args, again = repeated(args, batch), repeated(kwargs, batch)
        with torch.no_grad():
            expected = model(*again_args, **again)
            got = traced(*again_args, **again)
            assert error(dict(expected) if hasattr(expected, "keys") else expected, got) < EXACT
    assert plan.parameters == (count(model), count(traced))
    return plan


def assert_small(plan: ChannelPlan, name: str) -> None:
    parameters, macs = LEFT[name]
    assert plan.parameters[1] <= parameters * plan.parameters[0]
    assert plan.macs[1] <= macs * plan.macs[0]


@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES)])
def test_a_convolutional_family_is_shrunk_exactly(name: str, pytorchcv_model: Callable[..., nn.Module]) -> None:
    model = prepare(pytorchcv_model(name))
    plan = check(model, {}, (torch.randn(2, 3, *getattr(model, "in_size", (224, 224))),))
    assert_small(plan, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore")
def test_a_transformer_is_shrunk_exactly(name: str, transformers: Any) -> None:
    model, inputs = transformer(name, transformers)
    plan = check(prepare(model), inputs)
    assert_small(plan, name)
