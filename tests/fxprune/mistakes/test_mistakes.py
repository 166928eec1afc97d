"""Mistakes of those who begin: each ends at once, in an error that names the mistake and the cure, and changes nothing.

A row of a table is a call, the class of its error, what the message must say of the mistake, and what of the cure.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

import fxprune
from fxprune.errors import (
    ArgumentError,
    ArgumentTypeError,
    CaptureError,
    FxpruneWarning,
    InputError,
    NameLookupError,
    PruningError,
    SampleError,
)
from tests.beginners import IMAGES, L1, LABELS, LOADER, Case, Tokens, refused, small, state_of, unchanged


class Bare(nn.Module):
    def __init__(self) -> None:
        self.size = 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Silent(nn.Module):
    def forward(self, x: torch.Tensor) -> None:
        self.result = x + 1


def _scripted() -> torch.jit.ScriptModule:
    with pytest.warns(DeprecationWarning, match="torch.jit.script"):
        return torch.jit.script(nn.Sequential(nn.Linear(3, 2)))


TRACE: dict[str, Case] = {
    "a labelled batch": (
        lambda m: fxprune.trace(m, next(iter(LOADER))), SampleError, "2 inputs were given", "Labels are no input"),
    "a pair of inputs and labels": (
        lambda m: fxprune.trace(m, (IMAGES, LABELS)), SampleError, r"forward takes \(input\)", "Labels are no input"),
    "a loader": (
        lambda m: fxprune.trace(m, LOADER), SampleError, "args is a DataLoader", r"next\(iter\(loader\)\)"),
    "a loader in a tuple": (
        lambda m: fxprune.trace(m, (LOADER,)), SampleError, "an input is a DataLoader", "Take one batch"),
    "a dataset": (
        lambda m: fxprune.trace(m, LOADER.dataset), SampleError, "args is a TensorDataset", "without its labels"),
    "an iterator": (lambda m: fxprune.trace(m, iter([IMAGES])), SampleError, "args is a list_iterator", "Take one"),
    "a numpy array": (lambda m: fxprune.trace(m, IMAGES.numpy()), SampleError, "numpy ndarray", "torch.from_numpy"),
    "a numpy array in a tuple": (
        lambda m: fxprune.trace(m, (IMAGES.numpy(),)), SampleError, "an input is a numpy ndarray", "from_numpy"),
    "no inputs": (lambda m: fxprune.trace(m), SampleError, "no inputs were given", r"fxprune.trace\(model, \(input,\)"),
    "a shape for a tensor": (
        lambda m: fxprune.trace(m, (4, 3, 8, 8)), SampleError, "4 inputs were given", r"torch.randn\(4, 3, 8, 8\)"),
    "an input given twice": (
        lambda m: fxprune.trace(m, {"input": IMAGES}, {"input": IMAGES}), SampleError, "input is given twice",
        "Leave one out"),
    "a batch with labels by name": (
        lambda m: fxprune.trace(m, {"input": IMAGES, "labels": LABELS}), SampleError, "argument 'labels'", "names"),
    "a tensor as kwargs": (lambda m: fxprune.trace(m, (), IMAGES), SampleError, "kwargs is a Tensor", "by name"),
    "a wrong name": (
        lambda m: fxprune.trace(m, (), {"x": IMAGES}), SampleError, r"forward takes \(input\)", "by these names"),
    "two models": (lambda m: fxprune.trace(m, m), SampleError, "given two modules", r"fxprune.trace\(model, \(input,"),
    "a class": (lambda m: fxprune.trace(Tokens, (IMAGES,)), CaptureError, "got type", "an instance of the class"),
    "a scripted module": (
        lambda m: fxprune.trace(_scripted(), (torch.randn(4, 3),)), CaptureError, "TorchScript", "the eager module"),
    "arguments swapped": (lambda m: fxprune.trace(IMAGES, m), CaptureError, "got Tensor", "swapped"),
    "arguments swapped, in a tuple": (lambda m: fxprune.trace((IMAGES,), m), CaptureError, "got tuple", "swapped"),
    "a state dict": (lambda m: fxprune.trace(m.state_dict(), IMAGES), CaptureError, "OrderedDict", "load_state_dict"),
    "a path": (lambda m: fxprune.trace("model.pt", IMAGES), CaptureError, "got str", "Build the model"),
    "another number of channels": (
        lambda m: fxprune.trace(m, torch.randn(4, 1, 8, 8)), SampleError,
        r"does not run on these inputs in eval mode at 0 \(Conv2d\).*to have 3 channels, but got 1", "itself runs on"),
    "another dtype": (
        lambda m: fxprune.trace(m, IMAGES.double()), SampleError, "Input type .double.*Given were float64", "runs on"),
    "one image without a batch": (
        lambda m: fxprune.trace(m, IMAGES[0]), SampleError, r"expected 4D input.*float32\[3, 8, 8\]", "runs on"),
    "floats for token ids": (
        lambda m: fxprune.trace(Tokens(), (torch.randn(2, 3),)), SampleError, "Long, Int.*float32", "runs on"),
    "a list of modules": (
        lambda m: fxprune.trace(nn.ModuleList([m]), IMAGES), SampleError, "missing the required", "has no forward"),
    "a method of the model": (lambda m: fxprune.trace(m.eval, IMAGES), CaptureError, "got method", "the module itself"),
    "inputs one after another": (
        lambda m: fxprune.trace(m, IMAGES, LABELS), SampleError, "kwargs is a Tensor", "in a tuple.*labels are no"),
    "labels by name": (
        lambda m: fxprune.trace(m, (), {"input": IMAGES, "labels": LABELS}), SampleError, "argument 'labels'", "names"),
    "layers for a model": (
        lambda m: fxprune.trace([*m], IMAGES), CaptureError, "got list", "into nn.Sequential"),
    "a program for a model": (
        lambda m: fxprune.trace(torch.export.export(nn.ReLU(), (IMAGES,)), IMAGES), CaptureError, "ExportedProgram",
        r"torch.export.save\(program, 'model.pt2'\)"),
    "layers that have not seen inputs": (
        lambda m: fxprune.trace(nn.LazyLinear(2), IMAGES), CaptureError, "weight, bias of LazyLinear have no shape",
        "Run the model once"),
    "a model that has some values": (
        lambda m: fxprune.trace(nn.Sequential(m, nn.Linear(10, 2, device="meta")), IMAGES), CaptureError,
        "1.weight, 1.bias .* on the meta device", "load_state_dict"),
    "a sample without values": (
        lambda m: fxprune.trace(m, IMAGES.to("meta")), SampleError, "is on the meta device",
        "on the device of the model"),
    "an index without values": (
        lambda m: fxprune.trace(nn.Embedding(5, 3), torch.zeros(2, dtype=torch.long, device="meta")), SampleError,
        "is on the meta device", "Give it values"),
    "a model that was not initialized": (
        lambda m: fxprune.trace(Bare(), IMAGES), CaptureError, "Bare.__init__ does not call", "Call it first"),
    "a model that returns nothing": (
        lambda m: fxprune.trace(Silent(), IMAGES), CaptureError, "Silent.forward returns nothing", "Return the out"),
    "an empty batch": (
        lambda m: fxprune.trace(m, IMAGES[:0]), SampleError, r"an empty batch, of shape \(0, 3, 8, 8\)", "one or more"),
    "an empty batch by name": (
        lambda m: fxprune.trace(m, {"input": IMAGES[:0]}), SampleError, "an empty batch", "one or more"),
    "integers for a linear layer": (
        lambda m: fxprune.trace(nn.Linear(3, 2), torch.ones(4, 3).long()), SampleError,
        "does not run .*same dtype.*int64", "runs on"),
    "doubles for a linear layer": (
        lambda m: fxprune.trace(nn.Linear(3, 2), (torch.ones(4, 3).double(),), modes=("eval",), dynamic_shapes=None),
        SampleError, "does not run .*same dtype.*float64", "runs on"),
    "options of torch.onnx": (
        lambda m: fxprune.trace(m, IMAGES, dynamic_axes={0: "batch"}), ArgumentTypeError,
        "trace was called with 2 arguments by position, dynamic_axes=: got an unexpected",
        r"Did you mean dynamic_shapes\? It is called trace\(model, args=\(\), kwargs=None, \*, dynamic_shapes="),
    "True for the modes": (lambda m: fxprune.trace(m, IMAGES, modes=True), ArgumentError, "modes=True", "a tuple"),
    "True for the dynamic shapes": (
        lambda m: fxprune.trace(m, IMAGES, dynamic_shapes=True), ArgumentError, "dynamic_shapes=True", "structure"),
}  # fmt: skip


@pytest.mark.parametrize("case", TRACE.values(), ids=TRACE)
def test_what_trace_cannot_take_is_named_and_the_model_stays_as_it_was(case: Case) -> None:
    model = small()
    with unchanged(model):
        refused(case, model)
        if "does not run" in case[2]:
            with pytest.raises(SampleError) as caught:
                case[0](model)
            assert "torch.cond" not in str(caught.value)


def test_a_failure_leaves_generators_and_buffers_as_they_were() -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(3), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(x) + torch.rand(()) + random.random())

    model, x = Draws().train(), torch.randn(4, 3)
    before = torch.get_rng_state(), random.getstate()
    with unchanged(model), pytest.raises(SampleError, match="in train mode at head"):
        fxprune.trace(model, (x,), modes=("train",))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_the_models_own_failure_in_train_mode_is_what_the_warning_says() -> None:
    class EvalOnly(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                raise ValueError("no training here")
            return x + 1

    with pytest.warns(
        fxprune.errors.EvalOnlyWarning, match="does not run .* in train mode.*no training here"
    ) as caught:
        traced = fxprune.trace(EvalOnly(), (torch.randn(2, 3),))
    assert traced.modes == ("eval",)
    assert "torch.cond" not in str(caught[0].message)


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class Reads(nn.Module):
    def forward(self, x: Any) -> torch.Tensor:
        return x.value + 1


class Holds:
    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


@pytest.mark.parametrize(
    ("model", "args", "shapes", "advice"),
    [
        (Branches(), (torch.randn(3),), "batch", "torch.where, torch.cond"),
        (Reads(), (Holds(torch.randn(3)),), "batch", "register_dataclass"),
        (nn.Linear(3, 2), (torch.randn(4, 3),), {"wrong": None}, "`dynamic_shapes` in torch.export's structure"),
    ],
)
def test_the_advice_is_that_for_the_cause(model: nn.Module, args: Any, shapes: Any, advice: str) -> None:
    with pytest.raises(CaptureError, match="was to be captured") as caught:
        fxprune.trace(model, args, dynamic_shapes=shapes)
    assert advice in str(caught.value)
    advices = ("torch.cond", "register_dataclass", "structure")
    assert sum(other in str(caught.value).partition("Work around")[2] for other in advices) == 1


PRUNE: dict[str, Case] = {
    "a buffer": (
        lambda t: fxprune.prune.l1_unstructured(t, "1.running_mean", 0.5), NameLookupError,
        "'1.running_mean' is a buffer", "1.weight, 1.bias"),
    "a buffer for a norm": (
        lambda t: fxprune.weight_norm(t, "1.running_mean"), NameLookupError, "is a buffer", "1.weight, 1.bias"),
    "no amount": (
        lambda t: fxprune.prune.l1_unstructured(t, "0.weight"), ArgumentTypeError,
        "2 arguments by position: missing a required argument: 'amount'", r"l1_unstructured\(traced, name, amount, "),
    "no norm and no axis": (
        lambda t: fxprune.prune.ln_structured(t, "0.weight", 0.5), ArgumentTypeError, "missing .*'n'", "amount, n, "),
    "a ratio of channels": (
        lambda t: fxprune.prune.channels(t, ratio=0.5), ArgumentTypeError, "unexpected keyword argument 'ratio'",
        r"'ratio'\. It is called channels\(traced, amount=0.5,"),
    "FLOPs of channels": (
        lambda t: fxprune.prune.channels(t, flops=0.5), ArgumentTypeError, "keyword argument 'flops'", "'flops'. It"),
    "a tolerance by half its name": (
        lambda t: fxprune.compare(t, t, inputs=IMAGES, tol=1), ArgumentTypeError, "'tol'", "Did you mean rtol"),
    "an importance with its function": (
        lambda t: fxprune.importance.register("l3", max), ArgumentTypeError, "2 arguments", r"register\(name\)"),
    "limits by position": (
        lambda t: fxprune.clip_gradients(t.parameters(), 1.0), ArgumentTypeError,
        "clip_gradients was called with 2 arguments by position", r"clip_gradients\(optimizer, \*, max_norm=None,"),
    "inputs for finalize": (
        lambda t: fxprune.finalize(t, IMAGES), ArgumentTypeError, "finalize was called with 2 arguments",
        r"finalize\(traced, \*, shrink=True,"),
    "a torch number for an amount": (
        lambda t: fxprune.prune.l1_unstructured(t, "0.weight", torch.tensor(0.5)), ArgumentTypeError,
        r"amount=tensor\(0.5000\)", r"amount.item\(\)"),
    "an amount as text": (
        lambda t: fxprune.prune.l1_unstructured(t, "0.weight", "0.5"), ArgumentTypeError, "amount='0.5'", "a fraction"),
    "no number for an amount": (
        lambda t: fxprune.prune.ln_structured(t, "0.weight", float("nan"), 2, 0), PruningError, "amount=nan", "a fr"),
    "pairs as torch takes them": (
        lambda t: fxprune.prune.global_unstructured(t, [(t.get_submodule("0"), "weight")], L1, amount=0.5),
        NameLookupError, "got tuple", "path and the name: 'conv1.weight'"),
    "names for a name": (
        lambda t: fxprune.prune.l1_unstructured(t, ["0.weight", "3.weight"], 0.5), NameLookupError, "got list",
        "by a pattern"),
    "a parameter for its name": (
        lambda t: fxprune.prune.l1_unstructured(t, t.get_parameter("0.weight"), 0.5), NameLookupError,
        "got Parameter", r"named_parameters\(\)"),
    "a global amount by position": (
        lambda t: fxprune.prune.global_unstructured(t, "*.weight", L1, 0.5), ArgumentTypeError,
        "importance_scores is a float", "amount=0.5"),
    "a mask with NaN": (
        lambda t: fxprune.prune.custom_from_mask(t, "0.bias", torch.full((16,), torch.nan)), PruningError,
        "'0.bias' holds NaN", "Give 0 and 1"),
    "N of M of everything": (
        lambda t: fxprune.prune.nm_structured(t, "*"), PruningError, r"2:4 along axis 1 of .* \(16,\)",
        "Name weights alone"),
    "MACs in per cent": (
        lambda t: fxprune.prune.channels(t, macs=50), PruningError, "macs=50 cannot be", r"for 50 % give 0\.5\."),
    "MACs as a torch number": (
        lambda t: fxprune.prune.channels(t, macs=torch.tensor(0.5)), ArgumentTypeError, r"macs=tensor\(0.5000\)",
        "number: macs=0.5"),
    "a function of entries as importance": (
        lambda t: fxprune.prune.channels(t, importance=fxprune.importance.scores), ArgumentTypeError,
        r"scores, which takes \(traced, names,", "a function from a ChannelGroup alone"),
    "a dataset for a loader": (
        lambda t: fxprune.importance.scores(t, "*", "taylor", loader=LOADER.dataset, loss=nn.functional.cross_entropy),
        ArgumentError, "loader is a TensorDataset", "DataLoader"),
    "a batch of three": (
        lambda t: fxprune.importance.scores(t, "*", "taylor", loader=[(IMAGES, IMAGES, LABELS)], loss=max),
        ArgumentError, "a tuple of 3", r"\(\(x, mask\), target\)"),
    "a mapping with labels": (
        lambda t: fxprune.importance.scores(t, "*", "taylor", loader=[{"input": IMAGES, "labels": LABELS}], loss=max),
        InputError, r"a mapping with labels; the model takes \(input\)", r"give pairs \(inputs, target\)"),
    "a loss with swapped arguments": (
        lambda t: fxprune.importance.scores(
            t, "*", "taylor", loader=LOADER, loss=lambda target, output: nn.functional.cross_entropy(output, target)),
        ArgumentError, "the loss failed: .*Long", r"\(outputs, target\), here with float32\[4, 10\] and int64\[4\]"),
    "True for an amount": (
        lambda t: fxprune.prune.l1_unstructured(t, "0.weight", True), ArgumentTypeError, "amount=True", "a fraction"),
    "True for an amount of channels": (
        lambda t: fxprune.prune.ln_structured(t, "0.weight", True, 2, 0), ArgumentTypeError, "amount=True", "a count"),
    "False for an amount": (
        lambda t: fxprune.prune.random_unstructured(t, "0.weight", False), ArgumentTypeError, "amount=False", "count"),
    "True for a global amount": (
        lambda t: fxprune.prune.global_unstructured(t, "*.weight", L1, amount=True), ArgumentTypeError, "True", "a co"),
    "True within a method": (
        lambda t: fxprune.prune.apply(t, "0.weight", L1(True)), ArgumentTypeError, "amount=True", "a fraction"),
    "a module's path and a name, as torch takes them": (
        lambda t: fxprune.prune.l1_unstructured(t, "0", "weight", 0.5), ArgumentTypeError, "amount='weight'",
        "torch's pair .* is one name here"),
    "name and amount swapped": (
        lambda t: fxprune.prune.l1_unstructured(t, 0.5, "0.weight"), ArgumentTypeError, "amount='0.weight'",
        "then the qualified name, then the amount"),
    "an amount in quotes": (
        lambda t: fxprune.prune.l1_unstructured(t, "0.weight", "0.5"), ArgumentTypeError, "'0.5'",
        "quotes: amount=0.5"),
    "an amount in per cent": (
        lambda t: fxprune.prune.l1_unstructured(t, "0.weight", 30.0), ArgumentError, r"amount=30\.0",
        r"30 % give 0\.3;"),
    "a global method without its amount": (
        lambda t: fxprune.prune.global_unstructured(t, "*.weight", L1), ArgumentTypeError, "'amount'", "by name"),
    "a share of channels in per cent": (
        lambda t: fxprune.prune.channels(t, macs=50.0), ArgumentError, r"macs=50\.0: a fraction", r"50 % give 0\.5\."),
    "a share of the latency for a speedup": (
        lambda t: fxprune.prune.channels(t, speedup=0.5), ArgumentError, r"speedup=0\.5: a speedup is a factor",
        "give 2"),
    "an importance that returns nothing": (
        lambda t: fxprune.prune.channels(t, importance=lambda group: None), PruningError,
        "nothing is returned for '0.we", r"a tensor \[16\]"),
    "the name first": (
        lambda t: fxprune.prune.l1_unstructured("0.weight", t, 0.5), ArgumentTypeError, "got str", "comes first"),
    "a part and a name, as torch takes them": (
        lambda t: fxprune.prune.l1_unstructured(t.get_submodule("0"), "weight", 0.5), ArgumentTypeError,
        "got Container", "the whole traced module, and the qualified name"),
    "an eager model": (
        lambda t: fxprune.prune.l1_unstructured(small(), "0.weight", 0.5), ArgumentTypeError, "Sequential", "trace"),
    "a class of methods for an object": (
        lambda t: fxprune.prune.apply(t, "0.weight", L1), ArgumentTypeError, "class L1Unstructured", r"amount=0\.3"),
    "an object for a class of methods": (
        lambda t: fxprune.prune.global_unstructured(t, "*.weight", L1(0.5)), ArgumentTypeError, "subclass", "by name"),
    "a function for a class of methods": (
        lambda t: fxprune.prune.global_unstructured(t, "*", torch_prune.l1_unstructured, amount=0.5),
        ArgumentTypeError, "function", "Give the class"),
    "a mask in numpy": (
        lambda t: fxprune.prune.custom_from_mask(t, "0.bias", IMAGES.numpy()), ArgumentTypeError, "ndarray", "tensor"),
    "a mask for channels": (
        lambda t: fxprune.prune.custom_from_mask(t, "0.weight", torch.ones(16)), PruningError,
        r"shape \(16,\), and '0.weight' has \(16, 3, 3, 3\)", "expand_as"),
    "a number for names": (
        lambda t: fxprune.prune.global_unstructured(t, 3, L1, amount=0.5), ArgumentTypeError, "a int", "names of"),
    "an amount beside macs": (
        lambda t: fxprune.prune.channels(t, 0.5, macs=0.9), ArgumentError, "amount=0.5 and macs=0.9", "one of them"),
    "an amount beside parameters": (
        lambda t: fxprune.prune.channels(t, 0.99, parameters=0.9), ArgumentError,
        "amount=0.99 and parameters=0.9", "one of them"),
    "True for an amount of units": (
        lambda t: fxprune.prune.channels(t, True), ArgumentTypeError, "amount=True", "a number"),
    "a loader for an amount": (
        lambda t: fxprune.prune.channels(t, LOADER), ArgumentTypeError, "DataLoader", "loader=batches"),
    "a module for a name": (
        lambda t: fxprune.prune.channels(t, targets=t.get_submodule("0")), ArgumentTypeError, "Container", "a string"),
    "modules for names": (
        lambda t: fxprune.prune.channels(t, ignore=[t.get_submodule("0")]), NameLookupError, "Container", "a string"),
    "the class of a loss": (
        lambda t: fxprune.prune.channels(t, importance="taylor", loader=LOADER, loss=nn.CrossEntropyLoss),
        ArgumentTypeError, "the class CrossEntropyLoss", r"CrossEntropyLoss\(\)"),
    "one batch for a loader": (
        lambda t: fxprune.prune.channels(
            t, importance="taylor", loader=(IMAGES, LABELS), loss=nn.functional.cross_entropy),
        ArgumentError, "yielded a Tensor", r"loader=\[\(inputs, target\)\]"),
    "scores of entries as importance": (
        lambda t: fxprune.prune.channels(t, importance=fxprune.importance.scores(t, "*.weight")), ArgumentTypeError,
        "importance is a dict:", "a function from a ChannelGroup"),
    "a class of methods as importance": (
        lambda t: fxprune.prune.channels(t, importance=L1), ArgumentTypeError, "class, L1Unstructured", "ChannelGroup"),
    "a method object as importance": (
        lambda t: fxprune.prune.channels(t, importance=L1(0.5)), ArgumentTypeError, "is a L1Unstr", "ChannelGroup"),
    "data for an importance that looks at none": (
        lambda t: fxprune.prune.channels(t, loader=LOADER, loss=nn.functional.cross_entropy), ArgumentError,
        'loader and loss would be ignored: "l2"', '"taylor"'),
    "a percentage as text": (
        lambda t: fxprune.prune.channels(t, max_per_group="all"), ArgumentTypeError, "max_per_group='all'", "0 to 1"),
    "a seed as text": (
        lambda t: fxprune.prune.channels(t, importance="random", seed="0"), ArgumentTypeError, "seed='0'", "integer"),
    "scores in numpy": (
        lambda t: fxprune.prune.l1_unstructured(t, "0.weight", 0.5, IMAGES.numpy()), PruningError, "a nda", "tensor"),
    "True for a count of entries": (
        lambda t: fxprune.prune.nm_structured(t, "0.weight", True, 4), ArgumentError, "n=True", "integers"),
    "the state of an eager model": (
        lambda t: fxprune.prune.is_pruned(small()), ArgumentTypeError, "got Sequential", "fxprune.trace"),
    "removal of a norm that is not there": (
        lambda t: fxprune.remove_weight_norm(t, "0.weight"), PruningError, "no weight norm", "no parameter is rep"),
    "text for a switch": (lambda t: fxprune.finalize(t, shrink="no"), ArgumentTypeError, "shrink='no'", "True or"),
    "a dictionary for a plan": (
        lambda t: fxprune.finalize(t, plan={"0.weight": [0]}), ArgumentTypeError, "plan is a dict", "final.plan"),
    "a name for a callback": (lambda t: fxprune.finalize(t, after="print"), ArgumentTypeError, "'print'", "a function"),
    "a list for a curve": (
        lambda t: fxprune.Schedule(t, "0.weight", L1, 0.5, curve=["cubic"]), ArgumentError, "curve=", "cubic"),
    "a decorator without its name": (
        lambda t: fxprune.importance.register(lambda *given: {}), ArgumentTypeError, "got function", "As a decorator"),
    "a report for the module": (
        lambda t: fxprune.finalize(fxprune.Schedule(t, "0.weight", L1, 0.5)), ArgumentTypeError, "Schedule", "traced"),
}  # fmt: skip


SCHEDULE: dict[str, Case] = {
    "a method object": (
        lambda t: fxprune.Schedule(t, "*.weight", L1(0.5), 0.5), ArgumentTypeError,
        "an object of L1Unstructured", "Give the class, L1Unstructured"),
    "a method without names": (
        lambda t: fxprune.Schedule(t, None, L1, 0.5), ArgumentError, "L1Unstructured needs names", r"'\*.weight'"),
    "no amount": (
        lambda t: fxprune.Schedule(t, "*.weight", L1), ArgumentTypeError, "Schedule was called with 3 .*'amount'",
        r"Schedule\(traced, names, request, amount,"),
    "the number of the epoch for a step": (
        lambda t: fxprune.Schedule(t, "*.weight", L1, 0.5).step(3), ArgumentTypeError, "Schedule.step was called",
        r"It is called Schedule.step\(\)\."),
    "steps without an end": (
        lambda t: fxprune.Schedule(t, "*.weight", L1, 0.5, every=10), ArgumentError, "every=10 without stop",
        "Give stop"),
    "a curve without an end": (
        lambda t: fxprune.Schedule(t, "*.weight", L1, 0.5, start=3, curve="linear", initial=0.1), ArgumentError,
        "initial=0.1, curve='linear' without stop: all .* by call 3", "Give stop"),
    "the name of a method": (lambda t: fxprune.Schedule(t, "0.weight", "l1", 0.5), ArgumentTypeError, "'l1'", "subcl"),
    "what a function returned": (
        lambda t: fxprune.Schedule(t, None, object(), 0.5), ArgumentTypeError, "object", "given, not called"),
    "a function of fxprune.prune": (
        lambda t: fxprune.Schedule(t, "0.weight", fxprune.prune.l1_unstructured, 0.5), ArgumentTypeError,
        r"l1_unstructured, called with \(traced, name, amount, \.\.\.\)", "lambda gone"),
    "the function channels itself": (
        lambda t: fxprune.Schedule(t, None, fxprune.prune.channels, 0.5), ArgumentTypeError, "channels", "lambda gone"),
    "a function of torch": (
        lambda t: fxprune.Schedule(t, "0.weight", torch_prune.l1_unstructured, 0.5), ArgumentTypeError,
        r"\(module, name, amount, \.\.\.\)", "L1Unstructured"),
    "a function of nothing": (
        lambda t: fxprune.Schedule(t, None, lambda: None, 0.5), ArgumentTypeError, r"called with \(\)", "fraction"),
    "names and module swapped": (
        lambda t: fxprune.Schedule("0.weight", t, L1, 0.5), ArgumentTypeError, "got str", "comes first"),
    "names and method swapped": (
        lambda t: fxprune.Schedule(t, L1, "0.weight", 0.5), ArgumentTypeError, "names is L1", "names come first"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*PRUNE.values(), *SCHEDULE.values()], ids=[*PRUNE, *SCHEDULE])
def test_what_pruning_cannot_take_is_named_and_masks_nothing(traced: fxprune.TracedModule, case: Case) -> None:
    with unchanged(traced):
        refused(case, traced)


def test_numbers_of_numpy_are_numbers(captured: fxprune.TracedModule) -> None:
    reports = []
    for macs, round_to in ((0.5, 4), (np.float64(0.5), np.int64(4)), (np.float32(0.5), np.int32(4))):
        traced = copy.deepcopy(captured)
        reports.append(fxprune.prune.channels(traced, macs=macs, round_to=round_to, max_per_group=np.float32(1)))
    assert reports[0] == reports[1] == reports[2]
    dense = reports[0].macs[0]
    again = fxprune.prune.channels(copy.deepcopy(captured), macs=np.int64(dense // 2), round_to=4)
    assert again.macs == reports[0].macs


def test_a_schedule_that_prunes_another_module_ends_at_its_first_step(traced: fxprune.TracedModule) -> None:
    other = copy.deepcopy(traced)
    schedule = fxprune.Schedule(traced, None, lambda gone: fxprune.prune.channels(other, macs=1 - gone), 0.5)
    with unchanged(traced), pytest.raises(PruningError, match="pruned another module.*the module that the schedule"):
        schedule.step()
    assert not schedule.done


def test_a_schedule_that_prunes_nothing_is_told_of_where_its_module_is_finalized(traced: fxprune.TracedModule) -> None:
    schedule = fxprune.Schedule(traced, None, lambda gone: fxprune.prune.channels, 0.5)
    schedule.step()
    with pytest.warns(FxpruneWarning, match="asked its function for 0.5, and nothing of the module is masked"):
        fxprune.finalize(traced)


def test_a_schedule_that_is_never_stepped_is_told_of_where_its_module_is_finalized(
    traced: fxprune.TracedModule,
) -> None:
    schedule = fxprune.Schedule(traced, "0.weight", L1, 0.5)
    with pytest.warns(FxpruneWarning, match=r"a schedule to 0.5 .* step\(\) was never called"):
        fxprune.finalize(traced)
    schedule.step()
    fxprune.finalize(traced)
    dropped = fxprune.Schedule(traced, "0.weight", L1, 0.6)
    del dropped
    fxprune.finalize(traced)


def test_what_is_pruned_and_finalized_in_inference_mode_can_be_trained(traced: fxprune.TracedModule) -> None:
    with torch.inference_mode():
        fxprune.prune.channels(traced, 0.5)
        fxprune.prune.l1_unstructured(traced, "5.weight", 0.5)
        final = fxprune.finalize(traced)
    for module in (traced, final):
        nn.functional.cross_entropy(module.train()(IMAGES), LABELS).backward()
        assert all(parameter.grad is not None for parameter in module.parameters())


def test_the_default_amount_of_channels_is_a_half() -> None:
    reports = []
    for options in ({}, {"amount": 0.5}):
        torch.manual_seed(0)
        reports.append(fxprune.prune.channels(fxprune.trace(small(), (IMAGES,)), round_to=1, **options))
    assert reports[0] == reports[1]
    assert sum(gone for gone, _ in reports[0].removed.values()) == 10


@pytest.mark.parametrize("name", ["0.weight_mask", "0.weight_orig"])
def test_the_tensors_of_a_mask_lead_to_the_name_of_their_parameter(traced: fxprune.TracedModule, name: str) -> None:
    fxprune.prune.l1_unstructured(traced, "0.weight", 0.5)
    with unchanged(traced), pytest.raises(NameLookupError, match=f"'{name}' belongs to .*'0.weight'. Name that"):
        fxprune.prune.l1_unstructured(traced, name, 0.5)


@pytest.mark.parametrize(
    "call",
    [
        lambda part: torch_prune.l1_unstructured(part, "weight", amount=0.5),
        lambda part: torch_prune.ln_structured(part, "weight", amount=0.5, n=2, dim=0),
        lambda part: torch_prune.identity(part, "weight"),
        lambda part: torch_prune.global_unstructured([(part, "weight")], torch_prune.L1Unstructured, amount=0.5),
    ],
)
def test_torchs_pruning_of_a_traced_module_is_refused_where_it_is_called(
    traced: fxprune.TracedModule, call: Callable[[nn.Module], object]
) -> None:
    single = fxprune.trace(nn.Linear(3, 2), (torch.randn(4, 3),))
    for whole, part in ((traced, traced.get_submodule("0")), (single, single)):
        with unchanged(whole), pytest.raises(PruningError, match=r"torch.nn.utils.prune.*fxprune.prune.l1_unstr"):
            call(part)
    fxprune.prune.l1_unstructured(traced, "0.weight", 0.5)  # as before


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_torchs_norms_on_a_traced_module_are_refused_where_they_are_called(
    traced: fxprune.TracedModule, norm: Callable[[nn.Module], object]
) -> None:
    torch.manual_seed(0)
    parameters, before = state_of(traced), traced.eval()(IMAGES)
    with pytest.raises(ArgumentError, match="deleted or parametrized by torch.*fxprune.weight_norm"):
        norm(traced.get_submodule("0"))
    assert state_of(traced)[0] == [(*part[:2], False, *part[3:]) for part in parameters[0]]
    assert torch.equal(traced(IMAGES), before)
