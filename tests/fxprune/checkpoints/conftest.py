"""Captured networks that several files of this folder use, made once; a test that changes one takes a copy."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import fxprune
from tests.fxprune.checkpoints.twins import X
from tests.networks import Residual


@pytest.fixture(scope="session")
def dense() -> fxprune.TracedModule:
    """The network without masks and norms, with its own random weights."""
    torch.manual_seed(1)
    return fxprune.trace(Residual(), (X,))


@pytest.fixture(scope="session")
def captured() -> fxprune.TracedModule:
    """Masks on a weight and a bias, weight norm, spectral norm, a frozen parameter; batch norm and dropout inside."""
    torch.manual_seed(0)
    traced = fxprune.trace(Residual(), (X,))
    fxprune.prune.l1_unstructured(traced, "stem.weight", amount=0.5)
    fxprune.prune.l1_unstructured(traced, "stem.bias", amount=0.5)
    fxprune.weight_norm(traced, "head.weight", dim=1)
    fxprune.spectral_norm(traced, "inner.weight", n_power_iterations=2)
    fxprune.prune.l1_unstructured(traced, "head.parametrizations.weight.original1", amount=0.3)
    traced.get_submodule("norm").bias.requires_grad_(False)
    return traced


@pytest.fixture
def traced(captured: fxprune.TracedModule) -> fxprune.TracedModule:
    return copy.deepcopy(captured)


@pytest.fixture(scope="session")
def shrunk() -> fxprune.TracedModule:
    torch.manual_seed(0)
    traced = fxprune.trace(Residual(), (X,))
    fxprune.prune.channels(traced, amount=0.5)
    return fxprune.finalize(traced, align=1)


@pytest.fixture(scope="session")
def _content(captured: fxprune.TracedModule, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "model.fxp"
    fxprune.save(captured, path)
    return path.read_bytes()


@pytest.fixture
def path(tmp_path: Path, _content: bytes) -> Path:
    """The file of `captured`, in a folder of its own."""
    path = tmp_path / "model.fxp"
    path.write_bytes(_content)
    return path
