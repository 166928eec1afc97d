"""What the tests share: one thread, seeds, real models, and captured networks that are expensive to make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


@pytest.fixture(scope="session")
def _torchvision_operators() -> Iterator[None]:
    """torchvision's import needs operators that its build lacks beside a CPU build of torch."""
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    yield


@pytest.fixture(scope="session")
def transformers(_torchvision_operators: None) -> Any:
    """The transformers package."""
    import transformers

    return transformers


@pytest.fixture(scope="session")
def pytorchcv_model(_torchvision_operators: None) -> Callable[..., nn.Module]:
    """Builds a pytorchcv network with random weights."""
    from pytorchcv.model_provider import get_model

    def build(name: str, **kwargs: Any) -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = get_model(name, **kwargs)
        return model

    return build
