"""The attributes in which torch's own layers keep the sizes of their parameters."""

from __future__ import annotations

from torch import nn

from fxprune.channels.registry import REGISTRY


def follow_parameters(module: nn.Module) -> None:
    """Set the attributes of a layer to what its parameters have."""
    vars(module).update(REGISTRY.module_sizes(module))
