"""What a network loses with the channels of each group: an order of removal, and curves measured on its output."""

from fxprune.prune.sensitivity.curve import Curve
from fxprune.prune.sensitivity.measuring import sensitivity
from fxprune.prune.sensitivity.report import Sensitivity

__all__ = ["Curve", "Sensitivity", "sensitivity"]
