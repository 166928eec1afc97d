"""The demo: a residual network on scikit-learn's digits, dense and pruned, from training to onnxruntime."""

from .experiment import EPOCHS, run
from .network import DigitNet
from .progress import Step, progress
from .results import Result, Stage
from .variants import VARIANTS, Variant

__all__ = ["EPOCHS", "VARIANTS", "DigitNet", "Result", "Stage", "Step", "Variant", "progress", "run"]
