"""What an exported file says of itself."""

from __future__ import annotations

import hashlib
import json

import torch
import torch.utils._pytree as pytree
from torch.onnx import ONNXProgram

from fxprune.graph.calls import Call
from fxprune.graph.text import text
from fxprune.graph.traced import TracedModule
from fxprune.version import __version__

SIZES = "fxprune.sizes"  # of the free axes, in the sample


def metadata(final: TracedModule, precision: str = "float32") -> dict[str, str]:
    """The entries by key, `fxprune.version` and so on; the same for equal modules."""
    found = {"version": __version__, "precision": precision, "digest": digest(final)}
    if final.plan is not None:
        found["plan"] = final.plan.explain()
    return {f"fxprune.{key}": value for key, value in found.items()}


def captured_sizes(program: ONNXProgram, sample: Call) -> dict[str, str]:
    """The entry that says how long the free axes of the inputs are in the sample, by their names in the file."""
    tensors = [leaf for leaf in pytree.tree_leaves(tuple(sample)) if isinstance(leaf, torch.Tensor)]
    sizes = {
        str(name): size
        for value, tensor in zip(program.model.graph.inputs, tensors, strict=False)
        for name, size in zip(value.shape or (), tensor.shape, strict=False)
        if not isinstance(name, int)
    }
    return {SIZES: json.dumps(sizes)} if sizes else {}


def digest(final: TracedModule) -> str:
    """SHA-256 over the eval graph and every parameter and buffer, names, types and shapes included."""
    found = hashlib.sha256(text(final.graphs["eval"]).encode())
    for name, value in [*final.named_parameters(), *final.named_buffers()]:
        found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
