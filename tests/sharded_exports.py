"""What is exported of a sharded network, and what the first process holds meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import onnx
import onnxruntime
import torch
import torch.distributed as dist
from torch import nn

import fxprune
from fxprune import borrowing
from fxprune.export import onnx_files
from fxprune.serving import Counts
from tests import sharded_networks as networks
from tests.tensor_memory import most_private

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
        "int8": (masked, {"precision": "int8"}),
        "int8 by batches": (masked, {"precision": "int8", "calibration": [networks.inputs(3)]}),
        "captured again": (counting, {}),
        "sizes fixed": (masked, {"dynamic_shapes": None}),
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


def other_forms(spread: Spread, folder: str) -> dict[str, tuple[int, torch.Tensor]]:
    """By form of the file what the first process held by itself at the most, in bytes, and what the file gives."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(12)))
    module = spread(fxprune.trace(layers.eval(), (torch.ones(2, 1024),), modes=("eval",)))
    del layers
    tiny = fxprune.trace(nn.Linear(2, 2), (torch.ones(2, 2),), modes=("eval",))
    calls = {"a.pt2": fxprune.export.to_program, "a.pt": fxprune.export.to_torchscript, "a.onnx": _captured_again}
    readers = {"a.pt2": lambda path: torch.export.load(path).module(), "a.pt": torch.jit.load, "a.onnx": _run}
    borrowing.ROOM = 2**22
    found = {}
    for name, write in calls.items():
        write(tiny, f"{folder}/tiny-{name}", verify=False)  # what torch loads once
        held = most_private(lambda name=name, write=write: write(module, f"{folder}/{name}", verify=False))
        if not dist.is_initialized() or not dist.get_rank():
            found[name] = held, readers[name](f"{folder}/{name}")(torch.ones(2, 1024)).detach()
    assert [path for path in os.listdir(folder) if path.startswith(".")] == []
    return found


def _captured_again(module: fxprune.TracedModule, path: str, verify: bool) -> Any:
    return fxprune.export.to_onnx(module, path, verify=verify, dynamic_shapes=None)


def _run(path: str) -> Callable[[torch.Tensor], torch.Tensor]:
    session = onnxruntime.InferenceSession(path)
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])
