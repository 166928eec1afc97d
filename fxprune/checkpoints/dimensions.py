"""Entries of `torch.export`'s dynamic shapes as data, and back."""

from __future__ import annotations

from typing import Any

from torch.export import Dim

from fxprune.torch_internals import derived_dimension, dimension_hint


def dimension_to_data(dimension: Any) -> Any:
    """A size, None, a hint such as `Dim.AUTO`, a named dimension or a linear function of one, as JSON holds it."""
    if dimension is None or isinstance(dimension, int | str):
        return dimension
    if (derived := derived_dimension(dimension)) is not None:
        root, factor, offset = derived
        return [dimension_to_data(root), factor, offset]
    hint = dimension_hint(dimension)
    name = {"name": dimension.__name__} if hint is None else {"hint": hint}
    return name | {"min": dimension.min, "max": dimension.max if isinstance(dimension.max, int) else None}


def dimension_from_data(stored: Any, named: dict[str, Any]) -> Any:
    """The way back; `named` collects the named dimensions, so that each is one object in a whole tree."""
    if isinstance(stored, list):
        root, factor, offset = stored
        return dimension_from_data(root, named) * factor + offset
    if not isinstance(stored, dict):
        return stored
    bounds = {"min": stored["min"], "max": stored["max"]}
    if "name" in stored:
        return named.setdefault(stored["name"], Dim(stored["name"], **bounds))
    hint = getattr(Dim, stored["hint"])
    return hint if bounds == {"min": None, "max": None} else hint(**bounds)
