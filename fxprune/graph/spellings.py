"""Keys of state dicts: torch spells the state of a norm in two ways, by its legacy hook and as a parametrization."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

# suffix of the legacy hook's name, name within the parametrization
_SPELLINGS = (("_g", "original0"), ("_v", "original1"), ("_orig", "original"), ("_u", "0._u"), ("_v", "0._v"))


def respelled(state: Mapping[str, Any], own: Collection[str]) -> dict[str, Any]:
    """`state` with the keys that `own` lacks renamed to those of `own` that mean the same.

    Example:
        >>> respelled({"0.weight_g": 1}, ["0.parametrizations.weight.original0"])
        {'0.parametrizations.weight.original0': 1}
    """
    renamed = dict(state)
    for name in own:
        if name in renamed:
            continue
        for other in _other_spellings(name):
            if other in renamed and other not in own:
                renamed[name] = renamed.pop(other)
                break
    return renamed


def _other_spellings(name: str) -> Iterator[str]:
    for suffix, inner in _SPELLINGS:
        legacy = re.sub(rf"parametrizations\.([^.]+)\.{re.escape(inner)}$", rf"\1{suffix}", name)
        current = re.sub(rf"([^.]+){suffix}$", rf"parametrizations.\1.{inner}", name)
        yield from (other for other in (legacy, current) if other != name)
