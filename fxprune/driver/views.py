"""Modules to be read only, that share their tensors with the traced one: with plain parameters where they can be."""

from __future__ import annotations

from collections.abc import Collection

from fxprune.calling import named_arguments
from fxprune.channels.computed_weights import with_plain_weights
from fxprune.channels.groups import ChannelGroups, Grouping
from fxprune.driver.running import finalize_anew
from fxprune.graph.copies import copied_parameters, read_directly
from fxprune.graph.masks import masked_views
from fxprune.graph.reparametrizations import computed_names, reparametrized
from fxprune.graph.requirements import require_eval
from fxprune.graph.sharing_copies import sharing_copy
from fxprune.graph.spread_modules import hollow_copy, is_spread
from fxprune.graph.traced import TracedModule
from fxprune.passes import FoldReparametrizations, run_passes
from fxprune.progress import shown


def plain_view(traced: TracedModule) -> TracedModule:
    """The module with every reparametrization folded, to be read only: what none stands on is shared, not copied.

    What masks alone change is computed whenever it is read, so that it is never all held.

    Parameters are read where they are, and not from copies, so that their channels are the same before and after.
    """
    require_eval(traced, "the analysis of channels", values=False)
    names = reparametrized(traced)
    if not names and not any(map(copied_parameters, traced.graphs.values())):
        return traced
    plain = run_passes(sharing_copy(traced), finalize_anew(on_demand=True)).graph_module
    assert isinstance(plain, TracedModule)
    for graph in plain.graphs.values():
        read_directly(graph)
    plain.recompile()
    return plain


def without_norms(traced: TracedModule, names: Collection[str]) -> TracedModule:
    """The module with plain parameters where norms and parametrizations compute some, masks on these as they are.

    To be read only: all other tensors are shared, and the module itself is given where there is no such name.
    """
    normed = tuple(name for name in computed_names(traced) if name in names)
    normed += tuple(own.original_name for own in masked_views(traced) if own.name in names and own.original is None)
    if not normed:
        return traced
    fold = FoldReparametrizations(normed, keep_masks=True, anew=True)
    folded = run_passes(sharing_copy(traced), (fold,)).graph_module
    assert isinstance(folded, TracedModule)
    return folded


@named_arguments
@shown("find channel groups")
def channel_groups(traced: TracedModule) -> ChannelGroups:
    """The groups of slices that must be masked together, those that may be pruned first; changes nothing.

    Args:
        traced: a module with an eval graph.

    Returns:
        A list of `ChannelGroup` objects: kind, size, members, what a unit saves, and why it may not be pruned; its
        `table()` has one a line, its `to_dict()` the same as data.

    Raises:
        FinalizeError: there is no eval graph.

    Example:
        >>> [(g.name, g.kind, g.size) for g in fxprune.channel_groups(traced)]
        [('0.weight', 'channel', 16), ('2.weight', 'channel', 10)]
    """
    readable = hollow_copy(traced) if is_spread(traced) else traced  # relations ask for no values
    return ChannelGroups(Grouping(with_plain_weights(plain_view(readable))).groups)
