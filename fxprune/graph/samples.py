"""Sample inputs at other sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def stretched(leaves: Sequence[Any], sizes: Mapping[tuple[int, int], int]) -> list[Any]:
    """Flat inputs with some axes of other sizes, their entries repeated in turns; what was one tensor stays one.

    Args:
        leaves: the inputs. sizes: the new size by (index among the leaves, axis).

    Example:
        >>> stretched([torch.tensor([1, 2])], {(0, 0): 3})
        [tensor([1, 2, 1])]
    """
    changed: dict[int, torch.Tensor] = {}
    for (position, axis), size in sizes.items():
        source = leaves[position]
        tensor = changed.get(id(source), source)
        entries = torch.arange(size, device=tensor.device) % max(tensor.shape[axis], 1)
        changed[id(source)] = tensor.index_select(axis, entries)
    return [changed.get(id(leaf), leaf) for leaf in leaves]
