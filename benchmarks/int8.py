"""Pruned ResNet-50: float32 against int8, bytes and latency in onnxruntime, one thread, files in turns.

Run: python benchmarks/int8.py [network] [rounds]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from command import prepare, rounds
from models import cnn

import fxprune
from fxprune.export import bench, to_onnx


def main() -> None:
    prepare()
    traced = fxprune.trace(cnn(sys.argv[1] if len(sys.argv) > 1 else "resnet50").eval(), torch.randn(2, 3, 224, 224))
    for name, weight in list(traced.named_parameters()):
        if weight.dim() == 4:
            fxprune.prune.ln_structured(traced, name, amount=0.5, n=2, dim=0)
    final = fxprune.finalize(traced)
    batches = [torch.randn(2, 3, 224, 224) for _ in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        full = to_onnx(final, Path(folder, "float32.onnx"))
        small = to_onnx(final, Path(folder, "int8.onnx"), precision="int8", calibration=batches)
        measured = bench([full.path, small.path], rounds=rounds(30, position=2))
        for report, latency in zip((full, small), measured, strict=True):
            assert report.comparison is not None
            error = max(row.max_rel or 0.0 for row in report.comparison.rows)
            print(
                f"{report.precision}: {report.size:,} bytes ({report.size / full.size:.3f}), error {error:.1e}, median "
                f"{latency.median:.2f} ms (quartiles {latency.quartiles[0]:.2f} to {latency.quartiles[1]:.2f}), ratio "
                f"{latency.ratio:.3f}"
            )


if __name__ == "__main__":
    main()
