"""Tensors of a shrunk model that no call reads: they are cut to what the class makes of its configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from fxprune.artifacts.working_copy import follow_parameters
from fxprune.artifacts.zero_channels import Hold
from fxprune.graph.configuration_numbers import Number
from fxprune.graph.configurations import Configuration
from fxprune.graph.names import locate, tensor_at, tensors_of
from fxprune.torch_internals import ConvNd


@contextmanager
def cut_unread(written: nn.Module, configuration: Configuration, numbers: Mapping[str, Number]) -> Iterator[Hold]:
    """Have the tensors that no call reads with the sizes that numbers give them, inside the block, and on if kept.

    Of an axis that becomes shorter, the first entries stay; what becomes longer is left alone.

    Args:
        written: the shrunk model. configuration: of the model as it was, whose unread tensors count.
        numbers: that say the sizes of the others.
    """
    before: list[tuple[nn.Module, Tensor, Tensor, int | None]] = []
    hold, made = Hold(), configuration.made(numbers)
    there = tensors_of(written)
    for name, shape in ({} if made is None else made.unread).items():
        tensor = tensor_at(written, name) if name in there else None
        if tensor is None or tensor.shape == shape or tensor.dim() != len(shape):
            continue
        if any(size > own for size, own in zip(shape, tensor.shape, strict=True)):
            continue
        owner, attribute = locate(written, name)
        is_filter = isinstance(owner, ConvNd) and attribute == "weight"
        before.append((owner, tensor, tensor.data, owner.groups if is_filter else None))  # type: ignore[arg-type]
        tensor.data = tensor.data[tuple(map(slice, shape))].clone()
        if is_filter and made is not None:
            owner.groups = made.integers[name.rpartition(".")[0], "groups"]  # type: ignore[assignment]
        follow_parameters(owner)
    try:
        yield hold
    finally:
        if not hold.kept:
            for owner, tensor, values, groups in reversed(before):
                tensor.data = values
                if groups is not None:
                    owner.groups = groups  # type: ignore[assignment]
                follow_parameters(owner)
