"""Pruning within a training loop: of one's own, or of Lightning, the Trainer of transformers, or Accelerate.

The adapters stand in files of their own, which import their library: `fxprune.callbacks.lightning`,
`fxprune.callbacks.transformers` and `fxprune.callbacks.accelerate`.
"""

from fxprune.callbacks.ending import Finished
from fxprune.callbacks.loop import Pruning
from fxprune.callbacks.states import masks_from_states

__all__ = ["Finished", "Pruning", "masks_from_states"]
