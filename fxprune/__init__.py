"""fxprune: a compiler for pruned PyTorch models."""

from fxprune import export, importance, passes, prune
from fxprune.capture import trace
from fxprune.checkpoint import load, save
from fxprune.continuation import optimizer_after
from fxprune.diagnose import diagnose
from fxprune.driver import (
    channel_groups,
    finalize,
    remove_spectral_norm,
    remove_weight_norm,
    spectral_norm,
    weight_norm,
)
from fxprune.errors import FxpruneError, FxpruneWarning
from fxprune.export import compare
from fxprune.optimizer import clip_gradients
from fxprune.schedule import Schedule
from fxprune.traced import TracedModule
from fxprune.write_back import write_back

__version__ = "0.1.0"
__all__ = [
    "FxpruneError",
    "FxpruneWarning",
    "Schedule",
    "TracedModule",
    "channel_groups",
    "clip_gradients",
    "compare",
    "diagnose",
    "export",
    "finalize",
    "importance",
    "load",
    "optimizer_after",
    "passes",
    "prune",
    "remove_spectral_norm",
    "remove_weight_norm",
    "save",
    "spectral_norm",
    "trace",
    "weight_norm",
    "write_back",
]
