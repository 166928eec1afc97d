"""fxprune: a compiler for pruned PyTorch models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fxprune import channels, errors, passes, prune
from fxprune.artifacts.writing_back import write_back
from fxprune.capture.diagnosis import Fault, Faults, diagnose
from fxprune.capture.front_end import trace
from fxprune.channels import ChannelGroup, ChannelGroups, ChannelPlan, OperatorCall, register_operator
from fxprune.checkpoints.checkpoint import load, save
from fxprune.checkpoints.loading_states import load_state
from fxprune.checkpoints.slicing_states import slice_state
from fxprune.driver import (
    channel_groups,
    finalize,
    remove_spectral_norm,
    remove_weight_norm,
    spectral_norm,
    weight_norm,
)
from fxprune.errors import FxpruneError, FxpruneWarning
from fxprune.graph.calls import Call
from fxprune.graph.traced import TracedModule
from fxprune.prune import ChannelReport, importance
from fxprune.prune.latency import LatencyTable, latency_table
from fxprune.prune.repair import ReconstructionReport, reconstruct
from fxprune.prune.schedule import Schedule
from fxprune.prune.sensitivity import Sensitivity, sensitivity
from fxprune.training.clipping import GradientClipping, clip_gradients
from fxprune.training.continuation import optimizer_after
from fxprune.training.freezing import freeze_batch_norms
from fxprune.version import __version__

if TYPE_CHECKING:
    from fxprune import export
    from fxprune.export import compare

# grouped, in the order in which a model meets them
__all__ = [  # noqa: RUF022
    "__version__",
    # capture
    "trace",
    "TracedModule",
    "Call",
    "diagnose",
    "Fault",
    "Faults",
    # masks, norms and channels
    "prune",
    "importance",
    "Schedule",
    "ChannelReport",
    "sensitivity",
    "Sensitivity",
    "latency_table",
    "LatencyTable",
    "reconstruct",
    "ReconstructionReport",
    "channel_groups",
    "ChannelGroup",
    "ChannelGroups",
    "channels",
    "register_operator",
    "OperatorCall",
    "weight_norm",
    "remove_weight_norm",
    "spectral_norm",
    "remove_spectral_norm",
    # training
    "clip_gradients",
    "GradientClipping",
    "freeze_batch_norms",
    "optimizer_after",
    # deployment
    "finalize",
    "ChannelPlan",
    "passes",
    "write_back",
    "save",
    "load",
    "load_state",
    "slice_state",
    "export",
    "compare",
    # errors
    "errors",
    "FxpruneError",
    "FxpruneWarning",
]


# functions that are looked for at the top; those of `prune` come from there
_ROOMS = dict.fromkeys(("bench", "inspect", "to_onnx", "to_program", "to_torchscript"), "export")


def __getattr__(name: str) -> Any:
    """`export` and `compare` on first use: onnxruntime and onnxscript take as long to import as torch."""
    if name == "export":
        return importlib.import_module("fxprune.export")
    if name == "compare":
        return importlib.import_module("fxprune.export").compare
    if where := _ROOMS.get(name) or ("prune" if name in prune.__all__ else ""):
        raise errors.NameLookupError(f"{__name__} has no {name!r}. It is {__name__}.{where}.{name}.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
