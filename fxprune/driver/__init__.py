"""The functions that run passes: `finalize`, the norms inserted and removed by name, and what others look at."""

from fxprune.driver.clocks import Clock, clock, stopwatch
from fxprune.driver.finalizing import finalize, verify_equal
from fxprune.driver.norms import insert_norms, remove_spectral_norm, remove_weight_norm, spectral_norm, weight_norm
from fxprune.driver.running import fold, insert_masks, run
from fxprune.driver.views import channel_groups, plain_view, without_norms

__all__ = [
    "Clock",
    "channel_groups",
    "clock",
    "finalize",
    "fold",
    "insert_masks",
    "insert_norms",
    "plain_view",
    "remove_spectral_norm",
    "remove_weight_norm",
    "run",
    "spectral_norm",
    "stopwatch",
    "verify_equal",
    "weight_norm",
    "without_norms",
]
