"""Gradients that forward's operators do not have: those of `torch.autograd.Function` and of hooks on tensors.

torch.export records the operators within such a function, and no hook; the graph has the gradients of these operators.
Often they are the same, as of a function that saves memory. So models that have such code are run, and compared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import ExportedProgram

from fxprune.capture.protection import attributes_kept, generators_kept
from fxprune.capture.sample import Sample
from fxprune.errors import CaptureError
from fxprune.graph.calls import cloned
from fxprune.graph.equality import close
from fxprune.graph.seeding import seeded
from fxprune.graph.snapshot import preserved
from fxprune.reports import first_of
from fxprune.torch_internals import functions_applied

_ROUNDING = 1e-6  # of the largest gradient: less is what is left where terms cancel out, as before a norm


@contextlib.contextmanager
def own_gradients() -> Iterator[list[str]]:
    """Note what forward calls meanwhile that may have gradients of its own: names of functions, and of hooks."""
    found: dict[str, None] = {}
    names: list[str] = []
    hook = Tensor.register_hook

    def hooked(tensor: Tensor, function: Callable[..., Any]) -> Any:
        found["Tensor.register_hook"] = None
        return hook(tensor, function)  # type: ignore[no-untyped-call]

    Tensor.register_hook = hooked  # type: ignore[method-assign]
    try:
        with functions_applied(lambda kind: found.update({kind.__qualname__: None})):
            yield names
    finally:
        Tensor.register_hook = hook  # type: ignore[method-assign]
        names += found


def check_gradients(model: nn.Module, program: ExportedProgram, sample: Sample, names: list[str]) -> None:
    """Raise CaptureError where a captured train mode has other gradients than the model, on the sample.

    A model that does not run on the sample is not judged.

    Args:
        model: the module.
        program: what was captured of its train mode.
        sample: the inputs.
        names: what may have gradients of its own.
    """
    by_name = dict(model.named_parameters(remove_duplicate=False))
    with attributes_kept(model), generators_kept(), preserved(model, parameters=True), torch.enable_grad():
        model.train()
        try:
            expected = _gradients(model, sample, dict(model.named_parameters()))
        except Exception:  # whatever the model's own code raises
            return
        captured = program.module()
        found = _gradients(captured, sample, dict(captured.named_parameters()))
    wrong = _differing(_by_tensor(by_name, expected), _by_tensor(by_name, found))
    if differing := [name for name, parameter in model.named_parameters() if id(parameter) in wrong]:
        raise CaptureError(
            f"{type(model).__name__} was to be captured in train mode and cannot be: {first_of(differing)} would get "
            f"the gradients of forward's operators, not those that {first_of(names)} gives them, which no graph holds. "
            "Work around: spell it by operators that have these gradients, as x + (f(x) - x).detach() for one that "
            "passes them on, or train the eager model, and trace it for eval."
        )


def _gradients(module: Callable[..., Any], sample: Sample, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The gradients of a weighted sum of the outputs, by the names of the parameters that get some."""
    wanted = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    args, kwargs = cloned((sample.args, dict(sample.kwargs)))
    with seeded(nn.ParameterList(wanted.values())):
        outputs = [leaf for leaf in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(leaf, Tensor)]
        torch.manual_seed(1)
        sums = [(out * torch.randn_like(out)).sum().abs() for out in outputs if out.requires_grad]
    if not sums or not wanted:
        return {}
    found = torch.autograd.grad(sum(sums, torch.zeros(())), list(wanted.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(wanted, found, strict=True) if gradient is not None}


def _by_tensor(parameters: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """The gradients by the id of the model's tensor: the capture has one object for each name of a tied parameter."""
    found: dict[int, Tensor] = {}
    for name, gradient in gradients.items():
        key = id(parameters[name])
        found[key] = found[key] + gradient if key in found else gradient
    return found


def _differing(expected: Mapping[int, Tensor], found: Mapping[int, Tensor]) -> set[int]:
    """The parameters whose gradients differ by more than rounding, which is all there is of those that cancel out."""
    largest = max((_size(gradient) for gradient in (*expected.values(), *found.values())), default=0.0)
    differing = set()
    for key in {*expected, *found}:
        want, got = expected.get(key), found.get(key)
        size = max(_size(gradient) for gradient in (want, got) if gradient is not None)
        if size > _ROUNDING * largest and not (want is not None and close(want, got)):
            differing.add(key)
    return differing


def _size(gradient: Tensor) -> float:
    return float(gradient.abs().max()) if gradient.numel() else 0.0
