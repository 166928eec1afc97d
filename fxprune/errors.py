"""Errors and warnings. Every message says what was asked, what was found and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

__all__ = [
    "AnalysisWarning",
    "ArgumentError",
    "ArgumentTypeError",
    "ArtifactError",
    "BatchSpecializedWarning",
    "BudgetError",
    "CaptureError",
    "CompareError",
    "ConfigurationWarning",
    "EvalConstantWarning",
    "EvalOnlyWarning",
    "ExportError",
    "FinalizeError",
    "FixedSizeWarning",
    "FxpruneError",
    "FxpruneWarning",
    "InputError",
    "NameLookupError",
    "NonFiniteWarning",
    "OutputsDifferError",
    "PassError",
    "ProviderWarning",
    "PruningError",
    "SampleError",
    "ShardingError",
    "SparseGradientError",
    "StateDictError",
    "SuffixError",
    "WriteBackError",
]


class FxpruneError(Exception):
    """Base of every error that fxprune raises on purpose; the argument it was raised for is left as it was."""


class CaptureError(FxpruneError):
    """The model cannot be captured faithfully. Fix: change the named module, or trace the part that can be captured."""


class InputError(FxpruneError, ValueError):
    """Inputs do not match the capture. Fix: pass the captured structure, or trace again with `dynamic_shapes`."""


class SampleError(CaptureError, InputError):
    """The sample inputs given to `trace` are none that the model runs on. Fix: give those of one call, labels aside."""


class NameLookupError(FxpruneError, LookupError, AttributeError):
    """A parameter name matches nothing, or more than one. Fix: use one of the names the message lists."""


class ArgumentError(FxpruneError, ValueError):
    """An option has a value that cannot be used. Fix: the message states the accepted values."""


class ArgumentTypeError(FxpruneError, TypeError):
    """An option has a type that cannot be used. Fix: the message states the accepted types."""


class PruningError(FxpruneError, ValueError):
    """A mask could not be computed or does not fit its parameter. Any earlier mask is still in place."""


class BudgetError(PruningError):
    """A budget that no choice of channels keeps; says what the best is.

    Attributes:
        least: what the best leaves of a size, by "macs" or "parameters"; empty where it is not known.
    """

    def __init__(self, message: str, least: Mapping[str, int] | None = None) -> None:
        super().__init__(message)
        self.least = dict(least or {})


class PassError(FxpruneError):
    """A graph pass failed. The message names the pass, the passes before it, and the node."""


class FinalizeError(FxpruneError):
    """The model could not be finalized exactly. The traced module it was asked for is untouched."""


class OutputsDifferError(FinalizeError):
    """Outputs differ after a removal that kept nothing by which to tell where; `finalize` does it again, to tell."""


class ExportError(FxpruneError):
    """A file could not be written, or what was written does not compute what its source computes."""


class CompareError(FxpruneError):
    """Something given to `compare` cannot be run: not a model, damaged, or other inputs than the reference."""


class SuffixError(ExportError, CompareError, ArgumentError):
    """The name of a file does not end as its format's do. Fix: one of the endings that the message lists."""


class ArtifactError(FxpruneError):
    """A stored artifact is truncated, altered, of a later version, or does not belong to the given model."""


class StateDictError(ArtifactError, RuntimeError):
    """A state dict does not fit a traced module; a RuntimeError as torch's is. Nothing of it was loaded."""


class WriteBackError(FxpruneError):
    """The model's own class cannot hold the shrunk model. Fix: make the size that the message names an attribute.

    Attributes:
        places: the paths of the modules that cannot, as far as one is known.
        runs: whether the class runs all the same, once these modules have taken channels back as zeros.
    """

    def __init__(self, message: str, places: Iterable[str] = (), runs: bool = False) -> None:
        super().__init__(message)
        self.places = tuple(places)
        self.runs = runs


class SparseGradientError(FxpruneError, NotImplementedError):
    """A gradient is sparse, which torch cannot clip. Fix: build the layer with `sparse=False`."""


class ShardingError(FxpruneError, RuntimeError):
    """Processes that hold parts of one module cannot go on together: one is gone, late, or was asked something else.

    Fix: the message says what; after a lost process start all again, from the last checkpoint that is whole.
    """


class FxpruneWarning(UserWarning):
    """Base of fxprune's warnings."""


class AnalysisWarning(FxpruneWarning):
    """What fxprune found of an operator is wrong: its channels stay, and the rest shrinks. Fix: report the model."""


class BatchSpecializedWarning(FxpruneWarning):
    """The model is not polymorphic in its batch: the capture holds for the sample's batch size only."""


class FixedSizeWarning(FxpruneWarning):
    """An axis left to `torch.export.Dim.AUTO` was fixed: the capture holds for the sample's size alone there."""


class EvalOnlyWarning(FxpruneWarning):
    """The train mode of the model cannot be captured: the traced module has an eval graph only."""


class NonFiniteWarning(FxpruneWarning):
    """A parameter holds NaN or inf; it is carried through as torch does."""


class EvalConstantWarning(FxpruneWarning):
    """Channels went that are constant in eval mode alone: train mode changes. `keep_for_training` keeps them."""


class ConfigurationWarning(FxpruneWarning):
    """A configuration cannot say the sizes of its model, such as a width for each layer: it cannot be built from it."""


class ProviderWarning(FxpruneWarning):
    """onnxruntime does not run a file on the provider that was asked for, but on another one."""
