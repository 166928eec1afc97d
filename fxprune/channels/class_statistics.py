"""What a class computes from how many channels there are: its layers count those that they have alone."""

from __future__ import annotations

from collections.abc import Collection

import torch

from fxprune.channels.arguments import bound
from fxprune.channels.statistics import FirstResultAlone, GroupStatistics, RootMeanSquare, Statistics, rescalable
from fxprune.channels.values import Value
from fxprune.channels.walk import Walk

_SCALE = "its class scales by how many there are in a head"
_WHY = "its class takes statistics over them, and would over those that are left alone"


def keep_statistics_of_class(walks: Collection[Walk]) -> None:
    """Relate channels so that the class can take the statistics over what is left.

    The channels of one group of a group norm go together, as its layer has groups less then. Others stay, but for
    those of norms by the root mean square whose gain and eps take the count up. Where attention is given no scale,
    the channels of queries and keys stay.

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
        for node in walk.graph.find_nodes(
            op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default
        ):
            query = walk.env[node.all_input_nodes[0]]
            if bound(node).get("scale") is None and isinstance(query, Value):
                walk.pin_axis(node, query.axes[-1], _SCALE)


def _is_counted(edit: Statistics, rescaled: Collection[str]) -> bool:
    """Whether the class can count what went, or the edit only comes before the one that counts."""
    return isinstance(edit, FirstResultAlone) or (isinstance(edit, RootMeanSquare) and edit.gain in rescaled)
