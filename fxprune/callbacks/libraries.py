"""Libraries that only adapters need: imported with them, and named where they are missing or broken."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from torch import nn

from fxprune.errors import ArgumentError, FxpruneError
from fxprune.graph.traced import TracedModule


def library(*modules: str, extra: str) -> Any:
    """The first of these modules whose package is installed.

    Args:
        modules: dotted paths, in the order of preference.
        extra: of fxprune, that installs the package.

    Raises:
        FxpruneError: none is installed, or the one that is cannot be imported.

    Example:
        >>> library("lightning.pytorch", extra="lightning").Callback
    """
    there = [name for name in modules if importlib.util.find_spec(name.partition(".")[0]) is not None]
    if not there:
        raise FxpruneError(
            f"this needs {modules[0].partition('.')[0]}, which is not installed: pip install 'fxprune[{extra}]'."
        )
    try:
        return importlib.import_module(there[0])
    except Exception as error:  # of a broken installation, whose packages raise anything
        raise FxpruneError(
            f"{there[0]} is installed and cannot be imported: {type(error).__name__}: {error}. Mend the installation: "
            f"pip install --force-reinstall 'fxprune[{extra}]'."
        ) from error


def check_holds(model: nn.Module, traced: TracedModule, whose: str) -> None:
    """Raise ArgumentError unless a trainer's model is, or holds, the module that is pruned."""
    if any(module is traced for module in model.modules()):
        return
    others = [path or "itself" for path, module in model.named_modules() if isinstance(module, TracedModule)]
    cure = (
        f"Make the schedule for the traced module that it has: {', '.join(others[:3])}."
        if others
        else "It has no traced module: let it hold fxprune.trace(model, inputs), and call that."
    )
    raise ArgumentError(f"the schedule was made for a module that {whose} does not hold. {cure}")
