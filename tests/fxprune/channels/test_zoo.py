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
from tests.fxprune.channels.exactness import error

SMALL = ("resnet20_cifar10", "nin_cifar10")
# MACs left with half of every layer's rows zeroed, weights only
LEFT = {
    "resnet18": 0.48, "resnet50": 0.42, "bn_vgg16": 0.27, "mobilenet_w1": 0.165, "mobilenetv2_w1": 0.32,
    "densenet121": 0.28,
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
            assert error(dict(expected) if hasattr(expected, "keys") else expected, traced(*again_args, **again)) < 1e-9
    return plan


@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES)])
def test_a_convolutional_family_is_shrunk_exactly(name: str, pytorchcv_model: Callable[..., nn.Module]) -> None:
    model = prepare(pytorchcv_model(name))
    plan = check(model, {}, (torch.randn(2, 3, *getattr(model, "in_size", (224, 224))),))
    assert plan.macs[1] <= LEFT.get(name, 1.0) * plan.macs[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore")
def test_a_transformer_is_shrunk_exactly(name: str, transformers: Any) -> None:
    model, inputs = transformer(name, transformers)
    plan = check(prepare(model), inputs)
    assert plan.parameters[1] < plan.parameters[0]
