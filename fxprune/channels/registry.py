"""The operators that the channel analysis knows, and how one is looked up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Rule = Callable[[Any, Any], Any]
RULES: dict[str, Rule] = {}
TAGGED = "torch.Tag.pointwise"  # the rule of operators that torch tags so


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of the operators with these names (in-place variants included)."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def rule_of(target: Any) -> Rule | None:
    """The rule of an operator, None where there is none."""
    return RULES.get(operator_name(target)) or _by_tag(target)


def _by_tag(target: Any) -> Rule | None:
    """The pointwise rule, for operators that torch tags as pointwise (an in-place one by its functional twin)."""
    tags = set(getattr(target, "tags", ()))
    packet = getattr(target, "overloadpacket", None)
    if packet is not None and packet.__name__.endswith("_"):
        twin = getattr(getattr(torch.ops.aten, packet.__name__[:-1], None), target._overloadname, None)
        tags |= set(getattr(twin, "tags", ()))
    return RULES[TAGGED] if torch.Tag.pointwise in tags else None


def operator_name(target: Any) -> str:
    """The name that rules go by: an in-place variant's is that of its functional twin."""
    packet = getattr(target, "overloadpacket", None)
    if packet is None:
        return getattr(target, "__name__", str(target))
    name = str(packet.__name__)
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name
