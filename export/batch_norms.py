"""Batch norms and the layers in front of them, which torch's exporter joins: where that holds too much, or is wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import onnx_ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.rewriter import RewriteRuleSet
from onnxscript.rewriter.rules import common
from torch.onnx import ONNXProgram

from fxprune.borrowing import addressed, lent_as

_JOIN = RewriteRuleSet(
    [
        common.fuse_batchnorm_into_conv_rule,
        common.fuse_batchnorm_into_conv_transpose_rule,
        common.fuse_batchnorm_into_gemm_rule,
    ]
)


def optimize_narrow(program: ONNXProgram) -> None:
    """As torch does, but for batch norms, which stay: joined to weights of bfloat16 they would be float32."""
    with _norms_apart(program):
        program.optimize()


def optimize_lent(program: ONNXProgram) -> None:
    """As torch does; what it makes of a batch norm and borrowed weights is lent to the processes, one by one."""
    model = program.model
    with _norms_apart(program) as norms:
        program.optimize()
        for norm in norms:
            data, gain = norm.inputs[:2]
            layer = data.producer() if data is not None else None
            weight = layer.inputs[1] if layer is not None and len(layer.inputs) > 1 else None
            if gain is not None and gain in model.graph.inputs:
                model.graph.inputs.remove(gain)
            _JOIN.apply_to_model(model)
            if weight is None or (joined := model.graph.initializers.get(str(weight.name))) in (None, weight):
                continue
            before, made = weight.const_value, joined.const_value
            raw = getattr(before, "raw", None)
            if isinstance(raw, torch.Tensor) and made is not None:
                own: Any = type(before)  # torch's, of tensors
                joined.const_value = own(addressed(lent_as(torch.from_numpy(made.numpy()), raw)), name=weight.name)
    RemoveUnusedNodesPass()(model)


@contextlib.contextmanager
def _norms_apart(program: ONNXProgram) -> Iterator[list[onnx_ir.Node]]:
    """Within, torch's optimizer leaves batch norms as they are: it takes no weight that may be given as an input."""
    inputs = program.model.graph.inputs
    norms = [node for node in program.model.graph.all_nodes() if node.op_type == "BatchNormalization"]
    gains = [gain for gain in dict.fromkeys(norm.inputs[1] for norm in norms) if gain is not None]
    gains = [gain for gain in gains if gain.is_initializer() and not gain.is_graph_input()]
    inputs.extend(gains)
    try:
        yield norms
    finally:
        for gain in gains:
            if gain in inputs:
                inputs.remove(gain)
