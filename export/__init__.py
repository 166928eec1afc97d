"""Files for deployment, and the proof that they compute what they came from."""

from fxprune.calling import is_no_function
from fxprune.graph.calls import Call

from .comparison import compare
from .divergence import Divergence
from .generation import generate
from .inspection import Contents, inspect
from .latency import Latencies, Latency, bench, time_in_turns
from .onnx import ExportReport, to_onnx
from .parts import to_onnx_files
from .profiling import OperatorTime, Profile, profile
from .program import to_program, to_torchscript
from .report import Report, Row
from .session import Session
from .verification import FileReport

__all__ = [
    "Call",
    "Contents",
    "Divergence",
    "ExportReport",
    "FileReport",
    "Latencies",
    "Latency",
    "OperatorTime",
    "Profile",
    "Report",
    "Row",
    "Session",
    "bench",
    "compare",
    "generate",
    "inspect",
    "profile",
    "time_in_turns",
    "to_onnx",
    "to_onnx_files",
    "to_program",
    "to_torchscript",
]

is_no_function(
    __name__,
    "Files are written by its functions: fxprune.export.to_onnx(final, 'model.onnx'), "
    "fxprune.export.to_program(final, 'model.pt2') and fxprune.export.to_torchscript(final, 'model.pt').",
)
