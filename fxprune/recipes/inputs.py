"""Inputs of a call as a command line or a recipe says them: shapes, or files of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxprune.errors import ArgumentError
from fxprune.graph.calls import Call
from fxprune.recipes.samples import NAMELESS, TENSOR_FILES, call_of, tensors_of_file


def call_of_texts(given: Sequence[str]) -> Call:
    """The call that texts describe: tensors with names by name, all others by order.

    Args:
        given: shapes, as in "2x3x32x32", "x=2x3x32x32" or "ids=2x16:int64" (normal numbers, ones for integers), or
            files of tensors by name, .npz or .safetensors.

    Raises:
        ArgumentError: one of them is neither.

    Example:
        >>> call_of_texts(["2x3", "mask=2x3:int64"]).kwargs["mask"]
        tensor([[1, 1, 1], [1, 1, 1]])
    """
    args: list[torch.Tensor] = []
    kwargs: dict[str, torch.Tensor] = {}
    for text in given:
        try:
            call = call_of(tensors_of_file(text) if text.endswith(TENSOR_FILES) else _described(text))
        except Exception as error:  # of the readers, of torch, or of int
            raise ArgumentError(
                f"input '{text}' cannot be used: {type(error).__name__}: {error}. Give a shape (2x3x32x32, x=2x3, "
                "ids=2x16:int64) or an .npz or .safetensors file."
            ) from error
        args += call.args
        kwargs |= call.kwargs
    return Call(tuple(args), kwargs)


def _described(text: str) -> dict[str, torch.Tensor]:
    name, _, description = text.rpartition("=")
    sizes, _, dtype_name = description.partition(":")
    shape, dtype = [int(size) for size in sizes.split("x")], getattr(torch, dtype_name or "float32")
    tensor = torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.ones(shape, dtype=dtype)
    return {name or f"{NAMELESS}0": tensor}
