"""What is exported of a sharded network, and what the first process holds meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import torch
import torch.distributed as dist
from torch import nn

import fxprune
from fxprune.export import onnx_files
from fxprune.serving import Counts
from tests import sharded_networks as networks

Found = dict[str, dict[str, torch.Tensor]]
Spread = Callable[[fxprune.TracedModule], fxprune.TracedModule]


class Counting(nn.Module):
    """Writes into a buffer at each call, so that its graph is captured once more where it is exported."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 9), nn.Linear(9, 4)
        self.register_buffer("calls", torch.zeros(9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return self.outer(self.inner(x) + self.calls)


def initializers(path: str) -> dict[str, torch.Tensor]:
    """The weights in an ONNX file and beside it."""
    found = onnx.load(path).graph.initializer
    return {weight.name: torch.from_numpy(onnx.numpy_helper.to_array(weight).copy()) for weight in found}


def exported(spread: Spread, folder: str) -> tuple[Found, list[Counts]]:
    """By form of the module the weights in the file; and what was borrowed, by form."""
    torch.manual_seed(0)
    masked = spread(networks.traced())
    networks.P.l1_unstructured(masked, "*er.weight", 0.3)
    normed = spread(networks.traced())
    fxprune.weight_norm(normed, "inner.weight")
    counting = spread(fxprune.trace(Counting().eval(), (torch.ones(3, 6),)))
    forms: dict[str, tuple[fxprune.TracedModule, dict[str, Any]]] = {
        "masked": (masked, {}),
        "normed": (normed, {"opset": 20}),
        "half": (masked, {"precision": "float16"}),
        "sparse": (masked, {"sparse": True}),
        "captured again": (counting, {}),
    }
    networks.keep_nothing_whole()
    onnx_files.MAPPED_BYTES = 0
    counts = networks.counted_loans()
    found = {}
    for what, (module, options) in forms.items():
        path = f"{folder}/{what}.onnx"
        report = fxprune.export.to_onnx(module.eval(), path, **options)
        assert report.comparison is not None
        assert report.comparison.ok
        if not dist.is_initialized() or not dist.get_rank():
            found[what] = initializers(path)
    return found, counts


def over_tensor_parallel(spread: Spread, folder: str) -> Found:
    """Channels chosen, files and what is left of weights that were tensor-parallel before they were sharded."""
    module = spread(networks.traced())
    networks.P.channels(module, macs=0.5)
    if dist.is_initialized():
        networks.keep_nothing_whole()
        refused = networks.failures({"spread": lambda: fxprune.finalize(module)})["spread"]
        assert refused.startswith("ShardingError: the module is sharded by FSDP over weights that are spread already")
    report = fxprune.export.to_onnx(module.eval(), f"{folder}/network.onnx")
    fxprune.save(module, f"{folder}/network.fxp")
    final = fxprune.finalize(module, whole=dist.is_initialized())
    assert report.comparison is not None
    assert report.comparison.ok
    if dist.is_initialized() and dist.get_rank():
        return {}
    return {
        "final": networks.values(final),
        "output": {"": final.eval()(networks.inputs(2)).detach()},
        "written": initializers(f"{folder}/network.onnx"),
        "saved": networks.values(fxprune.load(f"{folder}/network.fxp")),
    }
