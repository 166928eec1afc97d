"""How far the outputs of a pruned network are those of the dense one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor


def agreement(dense: Sequence[Any], pruned: Sequence[Any]) -> dict[str, float]:
    """Over all samples, of the first output of floating point.

    Args:
        dense: by batch, the outputs of the dense network, [samples, ..., features]. pruned: those of the other.

    Returns:
        cosine: the mean cosine similarity along the last axis. error: the squared difference, relative to the squared
        outputs. same_class: the share of positions whose largest value is at the same place of the last axis, which
        says something of outputs that are logits.

    Example:
        >>> agreement([torch.eye(2)], [torch.eye(2)])
        {'cosine': 1.0, 'error': 0.0, 'same_class': 1.0}
    """
    wanted, found = (_rows(outputs) for outputs in (dense, pruned))
    return {
        "cosine": float(torch.nn.functional.cosine_similarity(wanted, found).mean()),
        "error": float((found - wanted).square().sum() / wanted.square().sum().clamp_min(torch.finfo().tiny)),
        "same_class": float((wanted.argmax(1) == found.argmax(1)).double().mean()),
    }


def _rows(outputs: Sequence[Any]) -> Tensor:
    tensors = [
        next(leaf for leaf in pytree.tree_leaves(each) if isinstance(leaf, Tensor) and leaf.is_floating_point())
        for each in outputs
    ]
    return torch.cat(
        [tensor.detach().double().reshape(-1, tensor.shape[-1] if tensor.dim() else 1) for tensor in tensors]
    )
