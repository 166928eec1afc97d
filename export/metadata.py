"""What an exported file says of itself."""

from __future__ import annotations

import hashlib

import torch

from fxprune.graph.text import text
from fxprune.graph.traced import TracedModule
from fxprune.version import __version__


def metadata(final: TracedModule, precision: str = "float32") -> dict[str, str]:
    """The entries by key, `fxprune.version` and so on; the same for equal modules."""
    found = {"version": __version__, "precision": precision, "digest": digest(final)}
    if final.plan is not None:
        found["plan"] = final.plan.explain()
    return {f"fxprune.{key}": value for key, value in found.items()}


def digest(final: TracedModule) -> str:
    """SHA-256 over the eval graph and every parameter and buffer, names, types and shapes included."""
    found = hashlib.sha256(text(final.graphs["eval"]).encode())
    for name, value in [*final.named_parameters(), *final.named_buffers()]:
        found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
