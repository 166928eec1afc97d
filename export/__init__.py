"""Files for deployment, and the proof that they compute what they came from."""

from .bench import Latency, bench
from .compare import Call, Report, Row, compare
from .inspect import Contents, inspect
from .onnx import ExportReport, to_onnx
from .program import to_program, to_torchscript
from .session import Session
from .source import FileReport

__all__ = [
    "Call",
    "Contents",
    "ExportReport",
    "FileReport",
    "Latency",
    "Report",
    "Row",
    "Session",
    "bench",
    "compare",
    "inspect",
    "to_onnx",
    "to_program",
    "to_torchscript",
]
