"""Mistakes of those who treat a traced module as the model that it was traced from: see `test_mistakes`."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import (
    ArgumentError,
    ArgumentTypeError,
    CaptureError,
    ExportError,
    FxpruneWarning,
    NameLookupError,
    StateDictError,
)
from tests.beginners import IMAGES, Case, Tokens, refused, small, smaller, unchanged


def _script(module: nn.Module) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(module)


def _masked_state(module: fxprune.TracedModule) -> dict[str, torch.Tensor]:
    return fxprune.prune.identity(copy.deepcopy(module), "0.weight").state_dict()


ACCESS: dict[str, Case] = {
    "a part that is called": (
        lambda t: t.get_submodule("0")(IMAGES), CaptureError, "a module below a traced one was to be called",
        "Call the traced module"),
    "a size of a part": (
        lambda t: t.get_submodule("0").out_channels, NameLookupError, "has no 'out_channels'", r"get_parameter.*shape"),
    "a layer by its index": (lambda t: t[0], NameLookupError, "item 0 was asked", r"get_submodule\('layers.0'\)"),
    "all layers": (lambda t: [*iter(t)], NameLookupError, "item 0 was asked", "by their names"),
    "a layer of a layer by its index": (
        lambda t: t.get_submodule("0")[0], NameLookupError, "item 0 was asked", "get_submodule"),
    "a parameter of another shape": (
        lambda t: setattr(t.get_submodule("5"), "weight", nn.Parameter(torch.ones(3, 64))), ArgumentError,
        r"'weight' .* one of shape \[3, 64\]; its graphs hold for \[10, 64\]", "Change the eager model"),
    "a part that is deleted": (
        lambda t: delattr(t, "5"), ArgumentError, "'5' of a traced module was to be deleted", "Change the eager model"),
    "scripting": (lambda t: _script(t), ExportError, "torch.jit.script", "export.to_torchscript"),
    "a path for a state": (
        lambda t: t.load_state_dict("w.pth"), ArgumentTypeError, "a mapping .* got str", r"torch.load\(path"),
    "a whole checkpoint for a state": (
        lambda t: t.load_state_dict({"model": t.state_dict(), "epoch": 3}), StateDictError, "Unexpected key.*model",
        "load its entry 'model'"),
    "the state of a wrapped model": (
        lambda t: t.load_state_dict(nn.DataParallel(small()).state_dict()), StateDictError, "module.0.weight",
        r"nn.DataParallel.*removeprefix\('module.'\)"),
    "a state with masks": (
        lambda t: t.load_state_dict(_masked_state(t)), StateDictError, "Unexpected.*0.weight_orig, 0.weight_mask",
        r"prune.identity\(traced, '0.weight'\)"),
    "the state of another model": (
        lambda t: t.load_state_dict(Tokens().state_dict()), StateDictError, "words.weight", "as it was traced"),
}  # fmt: skip


@pytest.mark.parametrize("case", ACCESS.values(), ids=ACCESS)
def test_what_a_traced_module_is_not_is_named_and_it_stays_as_it_was(traced: fxprune.TracedModule, case: Case) -> None:
    with unchanged(traced):
        refused(case, traced)


def test_states_of_before_pruning_and_before_removal_are_named_and_nothing_of_them_is_loaded(
    traced: fxprune.TracedModule,
) -> None:
    dense = {name: value + 1 for name, value in traced.state_dict().items()}
    final = smaller(copy.deepcopy(traced))
    fxprune.prune.identity(traced, "0.weight")
    cases = (
        (traced, "Missing key.*0.weight_mask", "It has no masks.*Load it before pruning"),
        (final, r"size mismatch: 0.weight \[16, 3, 3, 3\] for \[8, 3, 3, 3\]", "removed by fxprune.finalize"),
    )
    for module, mistake, cure in cases:
        with unchanged(module):
            refused((lambda m: m.load_state_dict(dense), StateDictError, mistake, cure), module)
    with pytest.raises(RuntimeError, match="size mismatch"):  # as torch's own, without strict, too
        final.load_state_dict(dense, strict=False)


def test_what_is_applied_and_changes_nothing_warns(traced: fxprune.TracedModule) -> None:
    def initialize(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)

    with unchanged(traced), pytest.warns(FxpruneWarning, match="apply changed nothing.*freeze_batch_norms"):
        assert traced.apply(initialize) is traced
    traced.apply(lambda module: [nn.init.zeros_(p) for p in module.parameters(recurse=False)])
    assert not any(p.count_nonzero() for p in traced.parameters())
    traced.apply(lambda module: module.requires_grad_(False))
    traced.apply(lambda module: module.eval() if module is traced else None)


def test_attributes_of_parts_that_are_asked_for_with_a_default_are_absent(traced: fxprune.TracedModule) -> None:
    part = traced.get_submodule("0")
    assert getattr(part, "kernel_size", None) is None
    assert not hasattr(part, "anything")
    assert not hasattr(copy.deepcopy(part), "anything")
