"""Copies of traced modules that share their tensors."""

from __future__ import annotations

from fxprune.graph.names import tensors_of
from fxprune.graph.traced import TracedModule


def sharing_copy(traced: TracedModule) -> TracedModule:
    """A copy with the same parameters and buffers, which are only to be read; in the copy others may take their place.

    Masks may be inserted into it, as these are buffers of their own. It has none of what FSDP adds.
    """
    return TracedModule.__deepcopy__(traced, {id(tensor): tensor for tensor in tensors_of(traced).values()})
