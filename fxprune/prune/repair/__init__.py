"""Repair: what is alive refitted to do the work of what is masked, by ridge least squares, reader by reader."""

from fxprune.prune.repair.report import ReaderRepair, ReconstructionReport
from fxprune.prune.repair.sweep import reconstruct

__all__ = ["ReaderRepair", "ReconstructionReport", "reconstruct"]
