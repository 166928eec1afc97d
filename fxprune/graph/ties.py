"""Parameters of one object under several names, where others take their place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fxprune.graph.names import tensors_of
from fxprune.sharding import is_sharded


@contextlib.contextmanager
def ties_kept(module: nn.Module) -> Iterator[None]:
    """Within, tensors of a module may be replaced name by name; what was tied is so again, where values are the same.

    A name that nothing was given for gets what the others have.
    """
    before = tensors_of(module)
    names: dict[int, list[str]] = {}
    for name, tensor in before.items():
        names.setdefault(id(tensor), []).append(name)
    yield
    after = tensors_of(module)
    for tied in names.values():
        given = [name for name in tied if after[name] is not before[name]]
        if len(tied) > 1 and given and all(_same(after[given[0]], after[name]) for name in given[1:]):
            for name in tied:
                path, _, leaf = name.rpartition(".")
                owner = module.get_submodule(path)
                held: dict[str, Tensor] = owner._parameters if leaf in owner._parameters else owner._buffers  # type: ignore[assignment]
                held[leaf] = after[given[0]]


def _same(left: Tensor, right: Tensor) -> bool:
    if left is right:
        return True
    if left.is_meta or right.is_meta or is_sharded(left) or is_sharded(right) or left.dtype != right.dtype:
        return False
    return torch.equal(left, right)
