"""What the tests of checkpoints share: a stored module and its twin, the roads to a file, and archives rewritten."""

from __future__ import annotations

import copy
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fxprune
from fxprune.graph.provenance import provenance_of
from fxprune.graph.reparametrizations import reparametrized
from tests.networks import Residual
from tests.systems import assert_same, assert_same_calls, assert_same_state, assert_same_training, call, sgd

ROADS = ("alone", "dense model", "traced model")
X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def loaded_by(road: str, path: Path, dense: fxprune.TracedModule) -> fxprune.TracedModule:
    """The file of a `Residual`, restored without the model, into the eager model or into the traced one."""
    if road == "alone":
        return fxprune.load(path)
    return fxprune.load(path, Residual() if road == "dense model" else dense)


def assert_twin(loaded: fxprune.TracedModule, traced: fxprune.TracedModule, args: tuple[Any, ...] = (X,)) -> None:
    """Same state, same training mode, same bits in both modes, in training and after finalize."""
    assert loaded.training == traced.training
    assert reparametrized(loaded) == reparametrized(traced)
    assert (loaded.plan is None) == (traced.plan is None)
    assert str(loaded.dynamic_shapes) == str(traced.dynamic_shapes)
    for left, right in zip(loaded.modules(), traced.modules(), strict=True):
        assert provenance_of(left).parameter_order == provenance_of(right).parameter_order
        assert left._non_persistent_buffers_set == right._non_persistent_buffers_set
    traced = copy.deepcopy(traced)
    assert_same_state(loaded, traced, "loaded")
    modes = [mode for mode in ("eval", "train", "eval") if mode in traced.modes]
    assert_same_calls(loaded, traced, args, modes)
    if "train" in modes:
        assert_same_training(loaded, traced, args, sgd, 2)
    finals = [fxprune.finalize(module, verify=False) for module in (loaded, traced)]
    for got, want in zip(*(call(final, "eval", args) for final in finals), strict=True):
        assert_same(got, want, "finalized")


def rewritten(path: Path, edit: Callable[[dict[str, bytes]], None]) -> Path:
    """A copy of an archive with other members, valid as an archive."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    edit(members)
    bad = path.with_name(f"bad{path.suffix}")
    with zipfile.ZipFile(bad, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return bad
