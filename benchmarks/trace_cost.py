"""Tracing against the two `torch.export` calls inside it.

Run: python benchmarks/trace_cost.py [network] [rounds]
"""

from __future__ import annotations

import sys

import torch
from command import rounds
from models import cnn
from pairs import alternate, report

import fxprune


def main() -> None:
    model = cnn(sys.argv[1] if len(sys.argv) > 1 else "resnet18")
    x = torch.randn(2, 3, 224, 224)
    shapes = ({0: torch.export.Dim.AUTO},)

    def exports() -> None:
        for training in (False, True):
            torch.export.export(model.train(training), (x,), dynamic_shapes=shapes, strict=False)

    candidates = {"two exports": exports, "fxprune.trace": lambda: fxprune.trace(model, (x,))}
    report(alternate(candidates, rounds(7, position=2), warmup=1))


if __name__ == "__main__":
    main()
