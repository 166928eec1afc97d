"""Mistakes of those who begin: each ends at once, in an error that names the mistake and the cure, and changes nothing.

A row of a table is a call, the class of its error, what the message must say of the mistake, and what of the cure.
"""

from __future__ import annotations

import contextlib
import copy
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune.errors import (
    ArgumentError,
    ArgumentTypeError,
    ArtifactError,
    CaptureError,
    CompareError,
    FxpruneError,
    InputError,
    NameLookupError,
    PruningError,
    SampleError,
    WriteBackError,
)
from fxprune.graph.text import text

pytestmark = pytest.mark.usefixtures("shared_translations")
IMAGES, LABELS = torch.randn(4, 3, 8, 8), torch.randint(10, (4,))
LOADER = DataLoader(TensorDataset(torch.randn(8, 3, 8, 8), torch.randint(10, (8,))), 4)
L1 = torch_prune.L1Unstructured

Case = tuple[Callable[..., object], type[FxpruneError], str, str]


def _model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3), nn.Flatten(), nn.Linear(64, 10)
    )


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(10, 4), nn.Linear(4, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(ids))


@pytest.fixture(scope="module")
def captured() -> fxprune.TracedModule:
    return fxprune.trace(_model(), (IMAGES,))


@pytest.fixture
def traced(captured: fxprune.TracedModule) -> fxprune.TracedModule:
    return copy.deepcopy(captured)


@pytest.fixture(scope="module")
def finalized(captured: fxprune.TracedModule) -> fxprune.TracedModule:
    return fxprune.finalize(captured)


@contextlib.contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Assert that parameters, buffers, their values, names and order, attributes, hooks, modes and graphs stay."""
    before, values = _state(module), {name: value.clone() for name, value in module.state_dict().items()}
    yield
    assert _state(module) == before
    assert all(torch.equal(value, values[name]) for name, value in module.state_dict().items())


def _state(module: nn.Module) -> list[Any]:
    parts = []
    for path, part in module.named_modules():
        tensors = [(name, id(t)) for held in (part._parameters, part._buffers) for name, t in held.items()]
        parts.append((path, type(part), part.training, tensors, sorted(vars(part)), len(part._forward_pre_hooks)))
    graphs = getattr(module, "graphs", {})
    return [parts, [(mode, text(graph)) for mode, graph in graphs.items()]]


def _refused(case: Case, *arguments: object) -> None:
    call, error, mistake, cure = case
    with pytest.raises(error) as caught:
        call(*arguments)
    message = str(caught.value)
    assert re.search(mistake, message), message
    assert re.search(cure, message), message


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
    "True for the modes": (lambda m: fxprune.trace(m, IMAGES, modes=True), ArgumentError, "modes=True", "a tuple"),
    "True for the dynamic shapes": (
        lambda m: fxprune.trace(m, IMAGES, dynamic_shapes=True), ArgumentError, "dynamic_shapes=True", "structure"),
}  # fmt: skip


@pytest.mark.parametrize("case", TRACE.values(), ids=TRACE)
def test_what_trace_cannot_take_is_named_and_the_model_stays_as_it_was(case: Case) -> None:
    model = _model()
    with _unchanged(model):
        _refused(case, model)
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
    with _unchanged(model), pytest.raises(SampleError, match="in train mode at head"):
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
    "the name first": (
        lambda t: fxprune.prune.l1_unstructured("0.weight", t, 0.5), ArgumentTypeError, "got str", "comes first"),
    "a part and a name, as torch takes them": (
        lambda t: fxprune.prune.l1_unstructured(t.get_submodule("0"), "weight", 0.5), ArgumentTypeError,
        "got Container", "the whole traced module, and the qualified name"),
    "an eager model": (
        lambda t: fxprune.prune.l1_unstructured(_model(), "0.weight", 0.5), ArgumentTypeError, "Sequential", "trace"),
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
        lambda t: fxprune.prune.is_pruned(_model()), ArgumentTypeError, "got Sequential", "fxprune.trace"),
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
    with _unchanged(traced):
        _refused(case, traced)


def test_the_default_amount_of_channels_is_a_half() -> None:
    reports = []
    for options in ({}, {"amount": 0.5}):
        torch.manual_seed(0)
        reports.append(fxprune.prune.channels(fxprune.trace(_model(), (IMAGES,)), round_to=1, **options))
    assert reports[0] == reports[1]
    assert sum(gone for gone, _ in reports[0].removed.values()) == 10


@pytest.mark.parametrize("name", ["0.weight_mask", "0.weight_orig"])
def test_the_tensors_of_a_mask_lead_to_the_name_of_their_parameter(traced: fxprune.TracedModule, name: str) -> None:
    fxprune.prune.l1_unstructured(traced, "0.weight", 0.5)
    with _unchanged(traced), pytest.raises(NameLookupError, match=f"'{name}' belongs to .*'0.weight'. Name that"):
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
        with _unchanged(whole), pytest.raises(PruningError, match=r"torch.nn.utils.prune.*fxprune.prune.l1_unstr"):
            call(part)
    fxprune.prune.l1_unstructured(traced, "0.weight", 0.5)  # as before


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_torchs_norms_on_a_traced_module_are_refused_where_they_are_called(
    traced: fxprune.TracedModule, norm: Callable[[nn.Module], object]
) -> None:
    torch.manual_seed(0)
    parameters, before = _state(traced), traced.eval()(IMAGES)
    with pytest.raises(ArgumentError, match="deleted or parametrized by torch.*fxprune.weight_norm"):
        norm(traced.get_submodule("0"))
    assert _state(traced)[0] == [(*part[:2], False, *part[3:]) for part in parameters[0]]
    assert torch.equal(traced(IMAGES), before)


FILES: dict[str, Case] = {
    "calibration with labels": (
        lambda f: fxprune.export.to_onnx(f, "m.onnx", precision="int8", calibration=LOADER), CompareError,
        "a list, of a DataLoader among the calibration batches", "inputs for inputs, labels in loader"),
    "calibration by pairs": (
        lambda f: fxprune.export.to_onnx(f, "m.onnx", precision="int8", calibration=[(IMAGES, LABELS)]), InputError,
        "called with 2 positional", "Labels are no input"),
    "a number of calibration batches": (
        lambda f: fxprune.export.to_onnx(f, "m.onnx", precision="int8", calibration=8), CompareError, "a int", "Give"),
    "a path before the module": (
        lambda f: fxprune.export.to_onnx("m.onnx", f), ArgumentTypeError, "given a str", "module comes first"),
    "an operator set as text": (
        lambda f: fxprune.export.to_onnx(f, "m.onnx", opset="18"), ArgumentTypeError, "opset='18'", "a number"),
    "a provider that is no list": (
        lambda f: fxprune.export.to_onnx(f, "m.onnx", providers="CPUExecutionProvider"), ArgumentTypeError,
        "providers='CPUEx", r"\['CPUExecutionProvider'\]"),
    "a name that is no list": (
        lambda f: fxprune.export.to_onnx(f, "m.onnx", input_names="image"), ArgumentTypeError, "'image'", "a list"),
    "the shapes of trace for those of a file": (
        lambda f: fxprune.export.to_onnx(f, "m.onnx", dynamic_shapes="batch"), ArgumentError, "'batch'", "is traced"),
    "no path": (lambda f: fxprune.export.to_program(f, None), ArgumentTypeError, "got NoneType", "the path of a file"),
    "a tolerance as text": (
        lambda f: fxprune.compare(f, f, inputs=IMAGES, rtol="1e-3"), ArgumentTypeError, "rtol='1e-3'", "a number"),
    "names that are one text": (
        lambda f: fxprune.compare(f, f, inputs=IMAGES, names="ab"), ArgumentTypeError, "names='ab'", "a list"),
    "a shape for an input": (
        lambda f: fxprune.compare(f, f, inputs=(4, 3, 8, 8)), InputError, "4 positional", r"captured with \(input\)"),
    "comparison with labels": (
        lambda f: fxprune.compare(f, f, inputs=(IMAGES, LABELS)), InputError, "2 positional", "Labels are no input"),
    "comparison with a labelled batch": (
        lambda f: fxprune.compare(f, f, inputs=[IMAGES, LABELS]), CompareError, "float32, int64", "inputs alone"),
    "comparison with labelled batches": (
        lambda f: fxprune.compare(f, f, inputs=list(LOADER)), CompareError, "hold a list", "inputs alone"),
    "comparison with a loader": (
        lambda f: fxprune.compare(f, f, inputs=LOADER), CompareError, "hold a list, of a DataLoader", "inputs alone"),
    "comparison with a dataset": (
        lambda f: fxprune.compare(f, f, inputs=LOADER.dataset), CompareError, "hold a TensorDataset", "inputs alone"),
    "measuring on several calls": (
        lambda f: fxprune.export.bench(["m.onnx"], inputs=[IMAGES, IMAGES]), ArgumentError, "2 calls were",
        "one is measured"),
    "verify as text": (
        lambda f: fxprune.export.to_program(f, "m.pt2", verify="no"), ArgumentTypeError, "verify='no'", "True or"),
    "comparison of eager models with labels": (
        lambda f: fxprune.compare(_model(), f, inputs=(IMAGES, LABELS)), CompareError, "takes 2 pos", "Labels are no"),
    "comparison with an array": (
        lambda f: fxprune.compare(f, f, inputs=IMAGES.numpy()), CompareError, "hold a ndarray", "torch.from_numpy"),
    "inputs without their name": (
        lambda f: fxprune.compare(f, f, (IMAGES,)), ArgumentTypeError, "given no inputs", r"inputs=\(x,\)"),
    "inputs before the models": (
        lambda f: fxprune.compare(IMAGES, f, inputs=f), CompareError, "hold a TracedModule", "come before"),
    "inputs among the models": (
        lambda f: fxprune.compare(f, IMAGES, inputs=IMAGES), CompareError, "a Tensor was given", "inputs=x"),
    "comparison with a class": (
        lambda f: fxprune.compare(f, Tokens, inputs=IMAGES), CompareError, "a type was given", "instance of Tokens"),
    "comparison with a file of weights": (
        lambda f: fxprune.compare(f, "weights.pth", inputs=IMAGES), CompareError, "weights.pth", "load_state_dict"),
    "one file to measure": (
        lambda f: fxprune.export.bench("m.onnx"), ArgumentTypeError, "a list of the paths", r"\['dense.onnx'"),
    "a module to measure": (lambda f: fxprune.export.bench([f]), ArgumentTypeError, "a list of the paths", "to_onnx"),
    "a module to inspect": (lambda f: fxprune.export.inspect(f), ArgumentTypeError, "got TracedModule", "the path"),
    "a call with labels": (lambda f: f(IMAGES, LABELS), InputError, "2 positional", "Labels are no input"),
    "a call with an array": (lambda f: f(IMAGES.numpy()), InputError, "is a ndarray", "torch.from_numpy"),
    "a call with a batch": (
        lambda f: f([IMAGES, LABELS]), InputError, "`input` is a list of 2", r"traced\(inputs\), labels aside"),
    "a call with a mapping": (
        lambda f: f({"input": IMAGES}), InputError, "`input` is a dict of 1", r"traced\(\*\*batch\)"),
    "save with swapped arguments": (
        lambda f: fxprune.save("m.fxp", f), ArgumentTypeError, "got str", "module comes first"),
    "save without a path": (lambda f: fxprune.save(f, None), ArgumentTypeError, "got NoneType", "path of a file"),
    "load with swapped arguments": (
        lambda f: fxprune.load(_model(), "m.fxp"), ArgumentTypeError, "got Sequential", "path comes first"),
    "load into a class": (
        lambda f: fxprune.load("m.fxp", Tokens), ArgumentTypeError, "got type", "instance of the class"),
    "write_back with swapped arguments": (
        lambda f: fxprune.write_back(_model(), f), ArgumentTypeError, "Sequential and a TracedModule", "swapped"),
    "write_back into a class": (
        lambda f: fxprune.write_back(f, Tokens), ArgumentTypeError, "a type", "instance of the class"),
    "write_back into another model": (
        lambda f: fxprune.write_back(f, Tokens()), WriteBackError, "Tokens has no 0.weight", "another model"),
    "write_back into weights": (
        lambda f: fxprune.write_back(f, f.state_dict()), ArgumentTypeError, "OrderedDict", "load these into it"),
    "optimizer_after with a scheduler": (
        lambda f: fxprune.optimizer_after(f, _scheduler()), ArgumentTypeError, "and StepLR", "the scheduler's"),
    "optimizer_after with swapped arguments": (
        lambda f: fxprune.optimizer_after(torch.optim.SGD(f.parameters(), 0.1), f), ArgumentTypeError,
        "got SGD and TracedModule", "swapped"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES.values(), ids=FILES)
def test_what_export_comparison_and_files_cannot_take_is_named_and_nothing_is_written(
    finalized: fxprune.TracedModule, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    final = copy.deepcopy(finalized)
    with _unchanged(final):
        _refused(case, final)
    assert not list(tmp_path.iterdir())


def test_an_onnx_file_says_that_labels_are_no_input(traced: fxprune.TracedModule, tmp_path: Path) -> None:
    fxprune.export.to_onnx(traced.eval(), tmp_path / "m.onnx")
    with pytest.raises(CompareError, match="2 inputs were given where 1 are taken .labels are no input.*'input'"):
        fxprune.compare(tmp_path / "m.onnx", tmp_path / "m.onnx", inputs=(IMAGES, LABELS))


def _write_onnx(path: Path) -> None:
    fxprune.export.to_onnx(fxprune.trace(nn.Linear(4, 2), (torch.randn(3, 4),)).eval(), path, verify=False)


def _write_script(path: Path) -> None:
    with pytest.warns(DeprecationWarning, match=r"torch\.jit\."):
        torch.jit.save(torch.jit.script(nn.Linear(4, 2)), path)


STRANGERS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "m.onnx": (_write_onnx, "is an ONNX file", "onnxruntime or fxprune.compare"),
    "m.pt": (_write_script, "is TorchScript", "torch.jit.load"),
    "m.pth": (lambda path: torch.save(_model().state_dict(), path), "is a file of torch.save", "load_state_dict"),
    "m.safetensors": (
        lambda path: safetensors.torch.save_file(_model().state_dict(), path), "of safetensors", "load_state_dict"),
}  # fmt: skip


def test_load_says_of_an_empty_file_that_it_is_empty(tmp_path: Path) -> None:
    (tmp_path / "m.fxp").touch()
    with pytest.raises(ArtifactError, match=r"is empty\. .* must be written again"):
        fxprune.load(tmp_path / "m.fxp")


@pytest.mark.parametrize("name", STRANGERS)
@pytest.mark.parametrize("is_renamed", [False, True], ids=["named", "renamed"])
def test_load_names_the_format_of_a_file_that_is_none_of_its_own(tmp_path: Path, name: str, is_renamed: bool) -> None:
    write, kind, cure = STRANGERS[name]
    write(tmp_path / name)
    path = (tmp_path / name).rename(tmp_path / "m.fxp") if is_renamed else tmp_path / name
    model = _model()
    for into in (None, model):
        with _unchanged(model), pytest.raises(ArtifactError, match=f"'{path}' {kind}|{kind}") as caught:
            fxprune.load(path, into)
        assert re.search(cure, str(caught.value))
        assert "truncated" not in str(caught.value)


def _scheduler() -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(torch.optim.SGD([nn.Parameter(torch.ones(2))]), 1)


@pytest.mark.parametrize(
    ("wrong", "cure"),
    [
        (lambda: _model().parameters(), "the one that holds these parameters.*clip_grad_norm_"),
        (_model, "the one that holds these parameters"),
        (lambda: torch.optim.SGD, "an instance of SGD"),
        (_scheduler, "the scheduler's optimizer"),
        (lambda: torch.amp.GradScaler("cpu"), "the optimizer that it scales for"),
    ],
    ids=["parameters", "model", "class", "scheduler", "scaler"],
)
def test_what_is_no_optimizer_leads_to_the_one_that_is_meant(wrong: Callable[[], Any], cure: str) -> None:
    with pytest.raises(ArgumentTypeError, match=f"with step hooks, got .*{cure}"):
        fxprune.clip_gradients(wrong(), max_norm=1.0)


def test_a_number_as_text_is_no_limit_for_gradients() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))])
    with pytest.raises(ArgumentTypeError, match="max_norm must be a number .*'1.0' of type str"):
        fxprune.clip_gradients(optimizer, max_norm="1.0")
    assert not optimizer._optimizer_step_pre_hooks
