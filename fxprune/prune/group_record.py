"""What is known of one group of channels, kept apart from the module that it was found in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fxprune.channels.groups import ChannelGroup
from fxprune.reports import plain


@dataclass(frozen=True, eq=False)
class GroupRecord:
    """A record of one group.

    Attributes:
        name, kind, size: of the group, as `ChannelGroup` has them, and how many units it has.
        members, units: the axes that it cuts, and the classes of its units, by which groups of one name differ.
    """

    name: str
    kind: str
    size: int
    members: tuple[str, ...]
    units: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it in JSON's types."""
        found: dict[str, Any] = plain(vars(self))
        return found

    def fits(self, group: ChannelGroup) -> bool:
        """Whether a group is of the same name and form; layers may have got biases since."""
        members = {str(member) for member in group.members}
        form = self.name, self.kind, self.size
        return form == (group.name, group.kind, group.size) and members.issuperset(self.members)


Record = TypeVar("Record", bound=GroupRecord)


def record_of(records: Sequence[Record], group: ChannelGroup) -> Record | None:
    """The record of a group, of several that fit the one of the same units; None where there is none."""
    fitting = [record for record in records if record.fits(group)]
    same = (record for record in fitting if record.units == tuple(group.units.tolist()))
    return next(same, fitting[0] if fitting else None)


class Labelled(Protocol):
    """What has the name and the kind of a group."""

    @property
    def name(self) -> str:
        """Of the group."""

    @property
    def kind(self) -> str:
        """Of its units."""


def numbered_labels(groups: Iterable[Labelled]) -> list[str]:
    """ "name (kind)" of each group, numbered from the second of that label on."""
    found, seen = list[str](), Counter[str]()
    for group in groups:
        label = f"{group.name} ({group.kind})"
        seen[label] += 1
        found.append(label if seen[label] == 1 else f"{label} {seen[label]}")
    return found
