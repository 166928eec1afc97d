"""Files for deployment, and the proof that they compute what they came from."""

from .compare import Call, Report, Row, compare
from .onnx import ExportReport, to_onnx
from .session import Session

__all__ = ["Call", "ExportReport", "Report", "Row", "Session", "compare", "to_onnx"]
