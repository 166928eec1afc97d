"""Buffers that a rewrite adds to the module whose calls read them."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxprune.graph.metadata import module_path
from fxprune.graph.names import join


def hold_buffer(node: fx.Node, stem: str, value: Tensor, *, shared: bool = False) -> str:
    """Hold a tensor as a buffer of the module that a call belongs to.

    Args:
        node: the call. Where that module has no parameters, and so is none of the graph's, the whole holds the buffer.
        stem: the buffer is the first of `stem_0`, `stem_1`, ... that is free.
        value: the tensor.
        shared: whether a buffer of that stem with the same entries serves as well.

    Returns:
        The buffer's qualified name.

    Example:
        >>> hold_buffer(call, "constant", torch.zeros(3))
        'block.constant_0'
    """
    root, path = node.graph.owning_module, module_path(node)
    assert root is not None
    try:
        owner = root.get_submodule(path)
    except AttributeError:
        path, owner = "", root
    number = 0
    while hasattr(owner, name := f"{stem}_{number}"):
        there = getattr(owner, name)
        if shared and isinstance(there, Tensor) and torch.equal(there.to(value.device), value):
            return join(path, name)
        number += 1
    owner.register_buffer(name, value)
    return join(path, name)
