"""What the tests share: one thread, seeds, real models, and captured networks that are expensive to make."""

from __future__ import annotations

import os

# Subprocesses take these from here; they must stand before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")  # captures of small graphs are a fifth faster without

import functools
import gc
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.fx.config
from hypothesis import settings
from torch import nn

torch.set_num_threads(1)
torch.fx.config.do_not_emit_stack_traces = True  # a tenth of every capture; `stack_traces` has them
settings.register_profile("fxprune", deadline=None, derandomize=True)
settings.load_profile("fxprune")


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector need not walk through it during every capture."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)  # captures make containers by the million, of which few are in circles


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def stack_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captures note the lines of the model's source that each node comes from, as they do for users."""
    monkeypatch.setattr(torch.fx.config, "do_not_emit_stack_traces", False)


@pytest.fixture(scope="session")
def _torchvision_operators() -> torch.library.Library | None:
    """torchvision's import needs operators that its build lacks beside a CPU build of torch."""
    if torch.version.cuda is not None:
        return None
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    return operators


@pytest.fixture(scope="session")
def transformers(_torchvision_operators: object) -> Any:
    """The transformers package."""
    import transformers

    return transformers


@pytest.fixture(scope="session")
def pytorchcv_model(_torchvision_operators: object) -> Callable[..., nn.Module]:
    """Builds a pytorchcv network with random weights."""
    from pytorchcv.model_provider import get_model

    def build(name: str, **kwargs: Any) -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = get_model(name, **kwargs)
        return model

    return build


@pytest.fixture(scope="session", autouse=True)
def _shared_translations() -> Iterator[None]:
    """One table of ONNX translations, and one of composite operators, for all exports.

    torch builds them anew in each, which is three quarters of a small one.
    """
    import torch._export.utils as tables
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        patch.setattr(tables, "_materialize_cpp_cia_ops", functools.cache(tables._materialize_cpp_cia_ops))
        yield


@pytest.fixture(scope="session")
def pytorchcv_class(_torchvision_operators: object) -> Callable[[str], Any]:
    """A class of pytorchcv's by the file and the name it has there: `resnet_cifar.CIFARResNet`."""

    def find(dotted: str) -> Any:
        module, _, name = dotted.partition(".")
        return getattr(importlib.import_module(f"pytorchcv.models.{module}"), name)

    return find


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A group of one process, in which nothing that is borrowed stays whole."""
    import torch.distributed as dist

    from fxprune import borrowing

    monkeypatch.setattr(borrowing, "SMALL", 0)
    monkeypatch.setattr(borrowing, "ROOM", 0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
