"""Attributes that users ask of a traced module, or set on it, and that no graph has: what to say of them."""

from __future__ import annotations

import difflib
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxprune.errors import CaptureError, FxpruneWarning, NameLookupError
from fxprune.graph.names import join
from fxprune.reports import first_of

_PLAIN = (bool, int, float, str, type(None))
_SHOWN = 8  # of the names of a module
_FUNCTIONS: Mapping[str, str] = {
    "bench": "fxprune.export.bench",
    "channel_groups": "fxprune.channel_groups(traced)",
    "channels": "fxprune.prune.channels(traced, macs=0.5)",
    "compare": "fxprune.compare(model, traced, inputs=inputs)",
    "explain": "fxprune.finalize(traced).plan.explain()",
    "export": "fxprune.export.to_onnx(final, 'model.onnx')",
    "finalize": "fxprune.finalize(traced)",
    "kept": "fxprune.finalize(traced).plan.kept",
    "prune": "fxprune.prune.l1_unstructured(traced, 'conv1.weight', amount=0.3), or fxprune.prune.channels(traced)",
    "report": "report = fxprune.prune.channels(traced, macs=0.5)",
    "save": "fxprune.save(traced, 'model.fxp')",
    "to_onnx": "fxprune.export.to_onnx(final, 'model.onnx')",
    "write_back": "fxprune.write_back(final, model)",
}


class Unknown:
    """Stands for the value of an attribute that is no number, text or None."""


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """The attributes that a module and its class add to those of every module; values other than plain are Unknown."""
    kinds = itertools.takewhile(lambda kind: kind is not nn.Module, type(module).__mro__)
    held = [vars(module), *(vars(kind) for kind in kinds)]
    found = {name: value for attributes in reversed(held) for name, value in attributes.items() if name.isidentifier()}
    return {
        name: value if isinstance(value, _PLAIN) else Unknown()
        for name, value in found.items()
        if not name.startswith("_") and name != "training" and not hasattr(nn.Module, name)
    }


def check_unseen(known: Mapping[str, Any], name: str, value: Any) -> None:
    """Say that no graph reads an attribute that the captured model had.

    Args:
        known: what it had, by name; other names are the user's own.
        name: the attribute.
        value: what it is to be; the number, text or None that it was passes.

    Raises:
        CaptureError: a number, text or None was to be another value.

    Warns:
        FxpruneWarning: it was something else, such as a method or a configuration.
    """
    if name not in known:
        return
    before = known[name]
    if isinstance(before, Unknown):
        warnings.warn(
            f"{name!r} was set on a traced module. The graphs go on with what was captured of the model's {name!r}: "
            "where forward reads it, set it on the eager model and trace that again.",
            FxpruneWarning,
            stacklevel=4,
        )
    elif type(before) is not type(value) or before != value:
        raise CaptureError(
            f"{name!r} was to be set on a traced module, whose graphs go on with {before!r}, as captured. Set it on "
            f"the eager model, and trace that again; what changes from call to call is an argument of forward, a "
            "tensor."
        )


def absent(root: nn.Module, part: nn.Module, name: str, known: Mapping[str, Any]) -> NameLookupError:
    """The error where a traced module, or one below it, is asked for what it has not.

    Args:
        root: the traced module.
        part: the module that was asked; the traced one itself, or one below it.
        name: what it was asked for; of the traced module a path, too.
        known: what the captured module had.
    """
    return NameLookupError(_Message(lambda: _said_of_absent(root, part, name, known)))


@dataclass(frozen=True)
class _Message:
    """A text that is put together when it is read: `hasattr` asks often, and reads none."""

    tell: Callable[[], str]

    def __str__(self) -> str:
        return self.tell()

    def __repr__(self) -> str:
        return repr(self.tell())

    def __reduce__(self) -> Any:
        return str, (self.tell(),)


def _said_of_absent(root: nn.Module, part: nn.Module, name: str, known: Mapping[str, Any]) -> str:
    path = next((path for path, module in root.named_modules() if module is part), "")
    told = f"{f'the module {path!r} of a traced one' if path else 'the traced module'} has no {name!r}"
    if name in known:
        return (
            f"{told}: of the captured one it keeps parameters, buffers and modules. Sizes are those of parameters, as "
            "in traced.get_parameter('conv1.weight').shape; p of dropouts, momentum and eps of norms are those of the "
            "captured graphs; all else is told by the eager model."
        )
    if name in _FUNCTIONS and not path:
        return f"{told}. What does it: {_FUNCTIONS[name]}."
    below = [*_below(part)]
    if near := [other for other in below if other.rpartition(".")[2] == name] or _similar(name, below):
        return f"{told}. Did you mean {first_of([join(path, other) for other in near], 3)}?"
    there = [other for other in below if "." not in other]
    return f"{told}. It has {first_of(there, _SHOWN)}." if there else f"{told}, nor anything else."


def _similar(name: str, names: Sequence[str]) -> list[str]:
    """Those that may be meant by a name, right below before others."""
    direct = [other for other in names if "." not in other]
    return difflib.get_close_matches(name, direct, 3, 0.7) or difflib.get_close_matches(name, names, 3, 0.7)


def _below(module: nn.Module) -> Iterator[str]:
    yield from (name for name, _ in module.named_modules() if name)
    yield from (name for name, _ in module.named_parameters())
    yield from (name for name, _ in module.named_buffers())
