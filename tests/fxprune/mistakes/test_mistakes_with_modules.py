"""Mistakes of those who treat a traced module as the model that it was traced from: see `test_mistakes`."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

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
from fxprune.graph.names import tensor_at
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
        r"fxprune.load_state\(traced, state\) inserts them"),
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


class Configured(nn.Module):
    scale = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.head, self.drop, self.norm = nn.Linear(4, 2), nn.Dropout(0.3), nn.BatchNorm1d(4, eps=0.01)
        self.dropout_p, self.config = 0.5, {"layers": 1}

    def extract(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.drop(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(nn.functional.dropout(self.extract(x), self.dropout_p, self.training)) * self.scale


@pytest.fixture(scope="module")
def configured() -> fxprune.TracedModule:
    return fxprune.trace(Configured(), torch.randn(3, 4))


def _reshape(module: fxprune.TracedModule, name: str) -> None:
    module.get_parameter(name).data = torch.zeros(3, 4)


ATTRIBUTES: dict[str, Case] = {
    "a length": (lambda t: len(t), ArgumentTypeError, "the length of a traced module", "named_children"),
    "a length of a part": (lambda t: len(t.head), ArgumentTypeError, "a module below it", "the eager model has"),
    "a layer that there is not": (lambda t: t.haed, NameLookupError, "has no 'haed'", "Did you mean head"),
    "a name like no other": (lambda t: t.conv7, NameLookupError, "has no 'conv7'", "It has head, drop, norm"),
    "a parameter without its layer": (lambda t: t.running_var, NameLookupError, "has no", "mean norm.running_var"),
    "a parameter that there is not": (lambda t: t.head.wieght, NameLookupError, "'head'.*'wieght'", "head.weight"),
    "a path": (lambda t: t.get_parameter("hed.weight"), NameLookupError, "no 'hed.weight'", "mean head.weight"),
    "a method": (lambda t: t.extract(1), NameLookupError, "no 'extract': of the captured", "by the eager model"),
    "a number": (lambda t: t.dropout_p, NameLookupError, "no 'dropout_p': of the captured", "p of dropouts"),
    "a function as a method": (lambda t: t.to_onnx("m.onnx"), NameLookupError, "no 'to_onnx'", "export.to_onnx"),
    "a number that is set": (
        lambda t: setattr(t, "dropout_p", 0.2), CaptureError, "'dropout_p' .* go on with 0.5", "on the eager model"),
    "a number of the class that is set": (
        lambda t: setattr(t, "scale", 3.0), CaptureError, "'scale' .* go on with 2.0", "on the eager model"),
    "a module that is called": (
        lambda t: fxprune.export(t, "m.onnx"), ArgumentTypeError, "export was called, which is a mod", "to_onnx"),
    "the module of a format that is called": (
        lambda t: fxprune.export.onnx(t, "m.onnx"), ArgumentTypeError, "export.onnx was called", "export.to_onnx"),
    "the module of masks that is called": (
        lambda t: fxprune.prune(t, 0.5), ArgumentTypeError, "prune was called", "prune.channels.traced"),
    "the module of channels that is called": (
        lambda t: fxprune.channels(t, 0.5), ArgumentTypeError, "channels was called", "prune.channels.traced"),
    "a function that is elsewhere": (
        lambda t: fxprune.l1_unstructured(t, "head.weight", 0.5), NameLookupError, "no 'l1_uns", "prune.l1_unstr"),
}  # fmt: skip


@pytest.mark.parametrize("case", ATTRIBUTES.values(), ids=ATTRIBUTES)
def test_what_no_graph_has_is_named_where_it_is_asked_for_or_set(configured: fxprune.TracedModule, case: Case) -> None:
    with unchanged(configured):
        refused(case, configured)


SHAPES: dict[str, Callable[[fxprune.TracedModule], object]] = {
    "a call": lambda t: t(torch.randn(3, 4)),
    "a call in train mode": lambda t: t.train()(torch.randn(3, 4)),
    "a mask": lambda t: fxprune.prune.l1_unstructured(t, "head.weight", amount=0.5),
    "channels": lambda t: fxprune.prune.channels(t, 0.5),
    "groups": fxprune.channel_groups,
    "finalize": fxprune.finalize,
    "export": lambda t: fxprune.export.to_onnx(t, "m.onnx"),
    "save": lambda t: fxprune.save(t, "m.fxp"),
}


@pytest.mark.parametrize("call", SHAPES.values(), ids=SHAPES)
def test_a_parameter_that_was_given_another_shape_is_named_at_its_next_use(
    configured: fxprune.TracedModule, call: Callable[[fxprune.TracedModule], object], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    traced = copy.deepcopy(configured).eval()
    _reshape(traced, "head.weight")
    refused((call, ArgumentError, r"'head.weight' .* shape \[3, 4\]; .* hold for \[2, 4\]", "change the eager"), traced)
    assert not list(tmp_path.iterdir())
    traced.get_parameter("head.weight").data = torch.zeros(2, 4)
    assert not traced(torch.randn(3, 4)).isnan().any()


@pytest.mark.parametrize(
    "name", ["head.weight_orig", "head.weight_mask", "head.parametrizations.bias.original1", "norm.weight_mask"]
)
def test_a_tensor_that_a_pass_inserted_and_was_given_another_shape_is_named(
    configured: fxprune.TracedModule, name: str
) -> None:
    traced = fxprune.prune.identity(copy.deepcopy(configured), "head.weight")
    for normed in ("head.bias", "norm.weight"):
        fxprune.weight_norm(traced, normed)
    fxprune.prune.identity(traced, "norm.weight")
    tensor = tensor_at(traced, name)
    shape = tensor.shape
    tensor.data = torch.zeros(5, 7)
    told = rf"'{name}' .* shape \[5, 7\]; .* hold for \[{', '.join(map(str, shape))}\]"
    for call in (SHAPES["a call"], SHAPES["a call in train mode"], fxprune.finalize):
        refused((call, ArgumentError, told, "the captured shape again"), traced)
    tensor.data = torch.ones(shape)
    assert not traced(torch.randn(3, 4)).isnan().any()


def test_attributes_of_a_traced_module_that_are_asked_for_with_a_default_are_absent(
    configured: fxprune.TracedModule,
) -> None:
    assert getattr(configured, "haed", None) is None
    assert getattr(configured, "plan", None) is None
    assert not hasattr(configured, "dropout_p")
    with pytest.raises(ImportError):
        exec("from fxprune import to_onnx")
    assert bool(configured)
    assert bool(configured.head)
    assert dict(inspect.getmembers(configured))["graphs"] is configured.graphs
    with pytest.raises(NameLookupError) as caught:
        _ = configured.haed
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # as between processes


def test_what_is_set_on_a_traced_module_and_was_the_same_or_is_the_users_own_passes(
    configured: fxprune.TracedModule,
) -> None:
    traced = copy.deepcopy(configured)
    traced.dropout_p, traced.epoch = 0.5, 3
    assert (traced.dropout_p, traced.epoch) == (0.5, 3)
    with pytest.warns(FxpruneWarning, match="'config' was set on a traced module.*on the eager model"):
        traced.config = {"layers": 2}
    assert traced.config == {"layers": 2}


def test_numbers_of_parts_are_read_from_the_graphs(configured: fxprune.TracedModule) -> None:
    traced = copy.deepcopy(configured)
    assert (traced.drop.p, traced.norm.eps, traced.norm.momentum) == (0.3, 0.01, 0.1)
    traced.drop.p = 0.1
    assert traced.drop.p == copy.deepcopy(traced).drop.p == 0.1
    assert not hasattr(traced.drop, "eps")
