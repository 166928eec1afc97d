"""State that forward carries from call to call in plain attributes: a graph would hold what it was at the capture."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxprune.capture.protection import attributes_kept, generators_kept
from fxprune.capture.sample import Sample
from fxprune.errors import CaptureError
from fxprune.graph.calls import cloned
from fxprune.graph.names import join
from fxprune.graph.snapshot import preserved
from fxprune.reports import first_of

_PLAIN = (bool, int, float, str, type(None))

Attributes = Mapping[str, Any]


def _plain_attributes(model: nn.Module) -> Attributes:
    """The numbers, texts, tensors and None that modules hold beside parameters and buffers, by name."""
    return {
        join(path, name): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (*_PLAIN, Tensor)) and name != "training"
    }


@contextlib.contextmanager
def changes_noted(model: nn.Module) -> Iterator[list[str]]:
    """Note which of them forward changes meanwhile: torch.export puts them back when it is done."""
    before, changed = _plain_attributes(model), list[str]()

    def note(*_: object) -> None:
        now = _plain_attributes(model)
        changed[:] = [name for name, value in before.items() if not _is_same(value, now.get(name, before))]

    hook = model.register_forward_hook(note)
    try:
        yield changed
    finally:
        hook.remove()


def _is_same(one: Any, another: Any) -> bool:
    if one is another:
        return True
    return type(one) is type(another) and isinstance(one, _PLAIN) and (one == another or one != one)


def check_calls(model: nn.Module, mode: str, sample: Sample, changed: list[str]) -> None:
    """Raise CaptureError where a second call on the same inputs gives something else, as forward changed attributes.

    A model that does not run on the sample, or does not give the same twice, is not judged.

    Args:
        model: the module. mode: "train" or "eval". sample: the inputs. changed: the attributes.
    """
    try:
        with generators_kept():
            with attributes_kept(model):
                first, second = _outputs(model, mode, sample), _outputs(model, mode, sample)
            if _are_equal(first, second):
                return
            with attributes_kept(model):
                again = _outputs(model, mode, sample)
    except Exception:  # whatever the model's own code raises
        return
    if _are_equal(first, again):
        raise CaptureError(
            f"{type(model).__name__} was to be captured in {mode} mode and cannot be: forward changes "
            f"{first_of(map(repr, changed))}, and gives something else when it is called again on the same inputs; the "
            "graph would repeat one call. Work around: register the state as a buffer (register_buffer), or make it an "
            "input and an output."
        )


def _outputs(model: nn.Module, mode: str, sample: Sample) -> list[Any]:
    args, kwargs = cloned((sample.args, dict(sample.kwargs)))
    with preserved(model, parameters=True), torch.enable_grad():
        model.train(mode == "train")
        leaves = pytree.tree_leaves(model(*args, **kwargs))
        return [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _are_equal(one: list[Any], another: list[Any]) -> bool:
    tensors = [[leaf for leaf in leaves if isinstance(leaf, Tensor)] for leaves in (one, another)]
    return len(tensors[0]) == len(tensors[1]) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*tensors, strict=True)
    )
