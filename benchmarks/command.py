"""What every benchmark does before it measures: one thread, no warnings of the peers, arguments of the command line."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import torch

_kept: list[torch.library.Library] = []  # a library that is let go takes its operators along


def prepare() -> None:
    """Let torch use one thread, and silence Torch-Pruning's and the exporter's warnings."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def argument(position: int, default: float) -> float:
    """A number given at this position (from 1), else the default."""
    return float(sys.argv[position]) if len(sys.argv) > position else default


def rounds(default: int, position: int = 1) -> int:
    """A count given at this position, else the default."""
    return int(argument(position, default))


def names(default: Sequence[str], position: int = 1) -> list[str]:
    """The words given from this position on, else the default."""
    return sys.argv[position:] or list(default)


def declare_torchvision() -> None:
    """Declare the operators that a build of torchvision beside a CPU torch lacks: its import takes hold of them."""
    try:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:  # they are there
        return
    _kept.append(library)
