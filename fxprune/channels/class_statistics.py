"""Statistics that a model's own class takes over channels: its layers count those that they have, no others."""

from __future__ import annotations

from collections.abc import Collection

from fxprune.channels.statistics import FirstResultAlone, GroupStatistics, RootMeanSquare, Statistics, rescalable
from fxprune.channels.walk import Walk

_WHY = "its class takes statistics over them, and would over those that are left alone"


def keep_statistics_of_class(walks: Collection[Walk]) -> None:
    """Relate channels so that the class can take the statistics over what is left.

    The channels of one group of a group norm go together, as its layer has groups less then. Others stay, but for those
    of norms by the root mean square whose gain and eps take the count up.

    Args:
        walks: over the graphs of a module, before their ids are resolved.
    """
    rescaled = rescalable(walks)
    for walk in walks:
        for edit in walk.edits:
            if isinstance(edit, GroupStatistics) and len(edit.ids) > 1:
                for column in edit.ids.T[1:]:
                    walk.ids.unify(edit.ids[:, 0].copy(), column.copy())
            elif isinstance(edit, Statistics) and not _is_counted(edit, rescaled):
                walk.pin(edit.node, edit.ids.reshape(-1), _WHY)


def _is_counted(edit: Statistics, rescaled: Collection[str]) -> bool:
    """Whether the class can count what went, or the edit only comes before the one that counts."""
    return isinstance(edit, FirstResultAlone) or (isinstance(edit, RootMeanSquare) and edit.gain in rescaled)
