"""Several modules written as one ONNX file and cut apart again: an export takes long, whatever its size."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx.utils
import torch
import torch.utils._pytree as pytree
from torch import nn

from fxprune.capture.front_end import trace
from fxprune.graph.traced import TracedModule

from .onnx import to_onnx


class _Together(nn.Module):
    """Modules side by side: takes the inputs of all, and gives the outputs of each."""

    def __init__(self, modules: Sequence[TracedModule]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self._counts = [len(module.example_args) for module in modules]

    def forward(self, *inputs: torch.Tensor) -> list[Any]:
        """The flat outputs of each."""
        found, start = [], 0
        for part, count in zip(self.parts, self._counts, strict=True):
            found.append(pytree.tree_leaves(part(*inputs[start : start + count])))
            start += count
        return found


def to_onnx_files(modules: Sequence[TracedModule], folder: str | os.PathLike[str]) -> list[Path]:
    """Write the eval graphs of modules as ONNX files, as they stand: sizes are those of the sample inputs.

    Args:
        modules: each takes tensors by position and returns tensors. folder: where the files go.

    Returns:
        The path of each.

    Raises:
        ExportError, CaptureError: torch cannot translate an operator.
    """
    together = _Together([module.eval() for module in modules]).eval()
    inputs = [tensor.clone() for module in modules for tensor in module.example_args]  # one tensor would be one input
    traced = trace(together, tuple(inputs), dynamic_shapes=None, modes=("eval",))
    outputs = [len(pytree.tree_leaves(module.run_example())) for module in modules]
    names = [[f"in_{i}_{k}" for k in range(len(module.example_args))] for i, module in enumerate(modules)]
    results = [[f"out_{i}_{k}" for k in range(count)] for i, count in enumerate(outputs)]
    whole = Path(folder, "together.onnx")
    every_name, every_result = ([*itertools.chain.from_iterable(each)] for each in (names, results))
    to_onnx(traced, whole, verify=False, input_names=every_name, output_names=every_result)
    extractor = onnx.utils.Extractor(onnx.load(whole))
    paths = []
    for i, (own, given) in enumerate(zip(names, results, strict=True)):
        path = Path(folder, f"part_{i}.onnx")
        onnx.save(extractor.extract_model(own, given), path)
        paths.append(path)
    return paths
