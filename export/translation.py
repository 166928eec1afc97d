"""torch's translation of a graph: what it lacks of operators, and errors that say what was to be written."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from onnxscript import opset18
from torch import fx

from fxprune.errors import ExportError, ShardingError

from .exact_numbers import scalar_tensor
from .grouped_products import NAMES, grouped_product
from .log_gamma import lgamma
from .quiet import quiet
from .simple_recurrent import simple_recurrent
from .sorted_places import bucketize, searchsorted

_COLOR = re.compile(r"\x1b\[\d+m")


def translations(graph: fx.Graph) -> dict[Any, Any]:
    """By operator, what writes it in ONNX: for `custom_translation_table` of torch.onnx.export.

    Those that others decompose to, as `isin` does to `searchsorted`, no graph calls itself.
    """
    own: dict[Any, Any] = {
        torch.ops.aten.rnn_tanh.input: simple_recurrent("Tanh"),
        torch.ops.aten.rnn_relu.input: simple_recurrent("Relu"),
        torch.ops.aten.scalar_tensor.default: scalar_tensor,
        torch.ops.aten.searchsorted.Tensor: searchsorted,
        torch.ops.aten.bucketize.Tensor: bucketize,
        torch.ops.aten.lgamma.default: lgamma,
        torch.ops.aten.sym_numel.default: opset18.Size,
    }
    called = dict.fromkeys(node.target for node in graph.nodes if node.op == "call_function")
    products = {target: grouped_product for target in called if str(target) in NAMES}
    return own | products


@contextlib.contextmanager
def translating(task: str) -> Iterator[None]:
    """Raise whatever torch, onnxscript or an operator's translation raises as an ExportError; `quiet` meanwhile."""
    try:
        with quiet(), fx.traceback.preserve_node_meta():
            yield
    except OSError:
        raise
    except Exception as error:
        causes = _causes(error)
        if lost := [cause for cause in causes if isinstance(cause, ShardingError)]:  # of what another process holds
            raise lost[0] from error
        chain = [_COLOR.sub("", f"{type(cause).__name__}: {cause}") for cause in causes]
        told = "; ".join(chain[1:] or chain)  # the first of several only says where to report
        raise ExportError(f"torch cannot {task}: {told}") from error


def _causes(error: Exception) -> list[BaseException]:
    """An error and its causes."""
    found: list[BaseException] = []
    cause: BaseException | None = error
    while cause:
        found.append(cause)
        cause = cause.__cause__
    return found
