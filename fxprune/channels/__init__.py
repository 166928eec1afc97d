"""Which channels can go, exactly, and how to take them out.

`analyze` finds them, `remove` takes them out of both graphs, `impose` gives a module the architecture of a stored plan,
`coupling` gives the groups that stand or fall together. What an operator does to channels is one class in `rules`;
`register_operator` adds one.
"""

from fxprune.calling import is_no_function
from fxprune.channels.analysis import Analysis, analyze
from fxprune.channels.coupling import Coupling, coupling
from fxprune.channels.groups import ChannelGroup, ChannelGroups, Member
from fxprune.channels.registry import OperatorCall, register_operator
from fxprune.channels.removal import impose, remove
from fxprune.graph.plan import ChannelPlan

__all__ = [
    "Analysis",
    "ChannelGroup",
    "ChannelGroups",
    "ChannelPlan",
    "Coupling",
    "Member",
    "OperatorCall",
    "analyze",
    "coupling",
    "impose",
    "register_operator",
    "remove",
]

is_no_function(
    __name__,
    "Channels are masked by fxprune.prune.channels(traced, macs=0.5), removed by fxprune.finalize(traced), and listed "
    "by fxprune.channel_groups(traced).",
)
