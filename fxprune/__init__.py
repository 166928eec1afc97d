"""fxprune: a compiler for pruned PyTorch models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fxprune import passes, prune
from fxprune.artifacts.checkpoint import load, save
from fxprune.artifacts.writing_back import write_back
from fxprune.capture.diagnosis import diagnose
from fxprune.capture.front_end import trace
from fxprune.channels import register_operator
from fxprune.driver import (
    channel_groups,
    finalize,
    remove_spectral_norm,
    remove_weight_norm,
    spectral_norm,
    weight_norm,
)
from fxprune.errors import FxpruneError, FxpruneWarning
from fxprune.graph.traced import TracedModule
from fxprune.prune import importance
from fxprune.prune.schedule import Schedule
from fxprune.training.clipping import clip_gradients
from fxprune.training.continuation import optimizer_after
from fxprune.training.freezing import freeze_batch_norms
from fxprune.version import __version__

if TYPE_CHECKING:
    from fxprune import export
    from fxprune.export import compare

__all__ = [
    "FxpruneError",
    "FxpruneWarning",
    "Schedule",
    "TracedModule",
    "__version__",
    "channel_groups",
    "clip_gradients",
    "compare",
    "diagnose",
    "export",
    "finalize",
    "freeze_batch_norms",
    "importance",
    "load",
    "optimizer_after",
    "passes",
    "prune",
    "register_operator",
    "remove_spectral_norm",
    "remove_weight_norm",
    "save",
    "spectral_norm",
    "trace",
    "weight_norm",
    "write_back",
]


def __getattr__(name: str) -> Any:
    """`export` and `compare` on first use: onnxruntime and onnxscript take as long to import as torch."""
    if name == "export":
        return importlib.import_module("fxprune.export")
    if name == "compare":
        return importlib.import_module("fxprune.export").compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
