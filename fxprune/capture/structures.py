"""Inputs and outputs that are dataclasses: torch takes them apart once it knows them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn


def register_dataclasses(value: Any) -> None:
    """Make the dataclasses in a structure known to torch, those within others too.

    For the life of the process: a captured graph takes every later call apart, and builds every result, by the
    specification that holds the class; without the registration these would fail.
    """
    for leaf in pytree.tree_leaves(value):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            kind = type(leaf)
            torch.export.register_dataclass(kind, serialized_type_name=f"{kind.__module__}.{kind.__qualname__}")
            register_dataclasses(leaf)


@contextlib.contextmanager
def outputs_registered(model: nn.Module) -> Iterator[None]:
    """Make the dataclasses that the model returns known to torch, as soon as it returns them."""
    hook = model.register_forward_hook(lambda module, args, output: register_dataclasses(output))
    try:
        yield
    finally:
        hook.remove()
