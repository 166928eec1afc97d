"""What the units of channel groups take in time: measured in the backend that runs the model, as a table."""

from fxprune.prune.latency.measuring import latency_table
from fxprune.prune.latency.table import LatencyCurve, LatencyTable

__all__ = ["LatencyCurve", "LatencyTable", "latency_table"]
