"""The arguments of a call by the names of the operator's schema, however they were passed."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import fx

from fxprune.torch_internals import schema_of


def bound(node: fx.Node) -> dict[str, Any]:
    """Every argument of the call by name, those left out with their defaults; {} for a Python function."""
    found = dict(_defaults(node.target))
    found.update(zip(found, node.args, strict=False))
    found.update(node.kwargs)
    return found


@functools.cache
def _defaults(target: Any) -> Mapping[str, Any]:
    """The arguments of an operator in order, with what they are where they are left out."""
    schema = schema_of(target)
    arguments = () if schema is None else schema.arguments
    return {a.name: a.default_value if a.has_default_value() else None for a in arguments}


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Replace one argument where it stands, or pass it by name where it was left out."""
    schema = schema_of(node.target)
    assert schema is not None, node
    names = [argument.name for argument in schema.arguments]
    position = names.index(name)
    if position < len(node.args):
        node.update_arg(position, value)
    elif position == len(node.args) and name not in node.kwargs and not schema.arguments[position].kwarg_only:
        node.args = (*node.args, value)
    else:
        node.update_kwarg(name, value)
