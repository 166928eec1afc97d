"""The numbers of a configuration by their names: reading them, and putting others in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

Number: TypeAlias = "int | float"
Numbers: TypeAlias = "dict[str, Number]"
# an object of a configuration, the name of a value in it, whether it had one of that name, and what it was
Before = tuple[Any, str, bool, Any]
UNSAID = "head_dim"  # which many classes read, if it is there
TOGETHER = " and "  # between the names of numbers that change together


def entries(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a configuration and of those within it by name, lists of other things than numbers left out."""
    for name, value in ({UNSAID: None} | vars(config)).items():
        if name.startswith("_"):
            continue
        if hasattr(value, "to_dict"):
            yield from entries(value, f"{prefix}{name}.")
        elif not isinstance(value, list | tuple) or all(type(entry) in (int, float) for entry in value):
            yield f"{prefix}{name}", value


def put_numbers(config: Any, numbers: Mapping[str, Number]) -> list[Before]:
    """Set numbers of a configuration, by their names; returns what they were, for `put_back`."""
    before: list[Before] = []
    for name, value in ((name, value) for names, value in numbers.items() for name in names.split(TOGETHER)):
        *path, last = name.split(".")
        entry = int(last) if last.isdecimal() else None  # of a list
        last = last if entry is None else path.pop()
        holder = config
        for part in path:
            holder = getattr(holder, part)
        own = vars(holder).get(last)
        before.append((holder, last, last in vars(holder), own))
        if entry is not None:
            assert isinstance(own, list | tuple)
            setattr(holder, last, type(own)(value if i == entry else other for i, other in enumerate(own)))
        else:
            setattr(holder, last, value)
    return before


def put_back(before: Sequence[Before]) -> None:
    """Undo `put_numbers`."""
    for holder, name, was_there, value in reversed(before):
        if was_there:
            setattr(holder, name, value)
        else:
            delattr(holder, name)
