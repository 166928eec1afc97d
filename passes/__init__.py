"""Graph passes: one file a pass, and the default pipelines."""

from fxprune.calling import is_no_function
from fxprune.graph.error_sites import visit, working_on

from .base import Callback, Pass, run_passes
from .eliminate_dead_code import EliminateDeadCode
from .fold_batch_norm import FoldBatchNorm
from .fold_reparametrizations import FoldReparametrizations
from .insert_mask import InsertMask, InsertMasks
from .insert_spectral_norm import InsertSpectralNorm
from .insert_weight_norm import InsertWeightNorm
from .remove_channels import RemoveChannels

FINALIZE: tuple[Pass, ...] = (FoldReparametrizations(), EliminateDeadCode())

__all__ = [
    "FINALIZE",
    "Callback",
    "EliminateDeadCode",
    "FoldBatchNorm",
    "FoldReparametrizations",
    "InsertMask",
    "InsertMasks",
    "InsertSpectralNorm",
    "InsertWeightNorm",
    "Pass",
    "RemoveChannels",
    "run_passes",
    "visit",
    "working_on",
]

is_no_function(
    __name__,
    "A pipeline runs by fxprune.passes.run_passes(traced, fxprune.passes.FINALIZE), all that finalizes a module by "
    "fxprune.finalize(traced).",
)
