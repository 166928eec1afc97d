"""Integers of the user's modules that may follow from a size: where they are, and the values that they could have."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# a size before, and what it is now
Change = tuple[int, int]

# names of attributes that hold a size, for those that forward does not read
_SIZE = re.compile(r"channels|features|planes|filters|hidden|embed|inner|width|units|heads?$|head_|dim|size|^n[fx]$")
_NO_SIZE = re.compile(r"kernel|patch|image|window|vocab|chunk|pad|max_|layer|step|dim$(?<!_dim)")
_LARGEST_RATIO = 16


@dataclass(frozen=True, eq=False)
class Slot:
    """An integer that may follow from a size: an attribute of `holder`, or an entry of one that is a tuple or list.

    `before` is its value in the model.
    """

    holder: Any
    name: str
    entry: int | None
    before: int

    def read(self) -> int:
        """The present value."""
        value = vars(self.holder)[self.name]
        return int(value if self.entry is None else value[self.entry])

    def write(self, value: int) -> None:
        """Give it a value; a tuple or list is replaced by a new one."""
        present = vars(self.holder)[self.name]
        if self.entry is not None:
            value = type(present)(value if i == self.entry else other for i, other in enumerate(present))
        vars(self.holder)[self.name] = value

    def names_a_size(self) -> bool:
        """Whether the attribute is called as attributes that hold a size are."""
        return bool(_SIZE.search(self.name)) and not _NO_SIZE.search(self.name)


def slots_by_module(root: nn.Module) -> dict[nn.Module, list[Slot]]:
    """The integers of every module, and of the objects that it alone holds, such as a configuration."""
    holders = Counter(id(value) for module in root.modules() for value in vars(module).values())
    return {module: [*_slots(module), *_slots_of_objects(module, holders)] for module in root.modules()}


def _slots_of_objects(module: nn.Module, holders: Counter[int]) -> Iterator[Slot]:
    for value in vars(module).values():
        is_private = holders[id(value)] == 1 and isinstance(getattr(value, "__dict__", None), dict)
        if is_private and not isinstance(value, nn.Module | Tensor | type) and not callable(value):
            yield from _slots(value)


def _slots(holder: Any) -> Iterator[Slot]:
    for name, value in vars(holder).items():
        if type(value) is int:
            yield Slot(holder, name, None, value)
        elif type(value) in (tuple, list):
            yield from (Slot(holder, name, i, entry) for i, entry in enumerate(value) if type(entry) is int)


def candidates(before: int, changes: Set[Change], written: Set[int] = frozenset()) -> list[int]:
    """The values that an integer could have now, given how the sizes around it changed, the likeliest first.

    Itself where a size of that value stayed; what a size of that value became; itself; the same multiple or fraction of
    a size that changed; a size that is written in a call nearby; a small number, since how many heads share one, say,
    is a ratio of two counts.

    Args:
        before: its value. changes: of sizes around it. written: sizes that calls there have as arguments now.

    Example:
        >>> candidates(16, {(16, 12)})
        [12, 16]
    """
    if before < 1:
        return [before]
    changed = sorted((change for change in changes if change[0] != change[1]), reverse=True)
    stayed = [before] if (before, before) in changes else []
    exact = [new for old, new in changed if old == before]
    related = [(old, new) for old, new in changed if old != before and (before % old == 0 or old % before == 0)]
    in_proportion = [before * new // old for old, new in related if before * new % old == 0]
    said = sorted((size for size in written if before > size > before // _LARGEST_RATIO), reverse=True)
    ratios = range(1, min(before, _LARGEST_RATIO)) if related else ()
    return list(dict.fromkeys([*stayed, *exact, before, *in_proportion, *(said if changed else ()), *ratios]))


def combinations(options: Sequence[Sequence[int]]) -> Iterator[tuple[int, ...]]:
    """Every choice of one value from each, those first whose values stand far in front.

    Example:
        >>> list(combinations([[1, 2], [3, 4]]))
        [(1, 3), (1, 4), (2, 3), (2, 4)]
    """
    lengths = [len(values) for values in options]
    for total in range(sum(lengths) - len(lengths) + 1):
        for places in _places(lengths, total):
            yield tuple(values[place] for values, place in zip(options, places, strict=True))


def _places(lengths: list[int], total: int) -> Iterator[tuple[int, ...]]:
    """Every choice of one index below each length, of this sum."""
    if not lengths:
        if total == 0:
            yield ()
        return
    for place in range(min(lengths[0], total + 1)):
        for rest in _places(lengths[1:], total - place):
            yield (place, *rest)


def derived(slot: Slot, changes: Sequence[Set[Change]], others: Sequence[Slot]) -> int:
    """The value of an integer that forward does not read, where the sizes leave one; else the value it had.

    Of sizes that were the same and became several, those that lie nearest count: a model's number of features is what
    its head reads, and not what layers somewhere within it have.

    Args:
        slot: the integer.
        changes: of sizes around it, the nearest first.
        others: those that forward reads, with the values that were found: the number of heads follows from their size.
    """
    found = [values for near in changes if (values := {new for old, new in near if old == slot.before})]
    values = found[0] if found else set()
    if not values:
        values = {
            new // other.read()
            for (old, new), other in itertools.product(set[Change]().union(*changes), others)
            if old != new and other.before * slot.before == old and new % other.read() == 0
        }
    return values.pop() if len(values) == 1 else slot.before
