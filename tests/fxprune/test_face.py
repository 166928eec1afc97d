"""What users touch is at the top, and every error is in one place."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil

import pytest
import torch
from torch import nn

import fxprune
import fxprune.errors
import fxprune.export


def test_every_name_of_the_face_is_there_once() -> None:
    for module in (fxprune, fxprune.errors, fxprune.channels, fxprune.export, fxprune.prune, fxprune.passes):
        assert len(set(module.__all__)) == len(module.__all__)
        missing = [name for name in module.__all__ if not hasattr(module, name)]
        assert not missing, module.__name__


@pytest.fixture(scope="module")
def traced() -> fxprune.TracedModule:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    nn.init.zeros_(model[0].weight[2])
    return fxprune.trace(model, torch.randn(3, 4))


def test_the_classes_of_what_users_get_are_at_the_top(traced: fxprune.TracedModule) -> None:
    optimizer = torch.optim.SGD(traced.parameters())
    (group, *_) = fxprune.channel_groups(traced)
    assert isinstance(group, fxprune.ChannelGroup)
    assert isinstance(fxprune.finalize(traced, align=1).plan, fxprune.ChannelPlan)
    assert isinstance(fxprune.clip_gradients(optimizer, max_norm=1.0), fxprune.GradientClipping)
    assert isinstance(fxprune.diagnose(nn.Linear(2, 2)), fxprune.Faults)
    assert fxprune.ChannelReport is fxprune.prune.ChannelReport


def is_usable(name: str) -> bool:
    """Whether the library is there that an adapter is for."""
    library = name.removeprefix("fxprune.callbacks.")
    return library not in ("lightning", "transformers", "accelerate") or importlib.util.find_spec(library) is not None


def test_every_error_and_warning_is_defined_with_the_others() -> None:
    found = set()
    for module in pkgutil.walk_packages(fxprune.__path__, "fxprune."):
        if module.name != "fxprune.__main__" and is_usable(module.name):
            members = vars(importlib.import_module(module.name)).values()
            found |= {m for m in members if isinstance(m, type) and issubclass(m, Exception)}
    own = {m for m in found if m.__module__.startswith("fxprune")}
    assert {m.__module__ for m in own} == {"fxprune.errors"}
    assert {m.__name__ for m in own} == set(fxprune.errors.__all__)
    for error in own:
        assert issubclass(error, fxprune.FxpruneError | fxprune.FxpruneWarning)
        assert error.__doc__
