"""What a graph's results depend on: nodes that give the same for every input end it, whatever numbers they give.

Facts say what is constant in numbers, by channel. A node may be the same for every input and have no such numbers: a
recurrent layer over constants has other ones at every step. What it computes from is dead then, and stays.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import fx

from fxprune.channels.arguments import bound
from fxprune.channels.axes import reduced_shape
from fxprune.channels.fixed_channels import FixedChannels
from fxprune.channels.ids import Vector
from fxprune.channels.readers import Reader
from fxprune.channels.registry import REGISTRY
from fxprune.channels.rules.recurrent import Recurrent, RecurrentCell
from fxprune.channels.values import Value
from fxprune.channels.walk import Result, Walk
from fxprune.graph.mutation import is_mutating, may_write, written

aten = torch.ops.aten


def fixed_nodes(walk: Walk, of: Callable[[Vector], Vector]) -> set[fx.Node]:
    """The nodes of an eval graph that give the same for every input of given sizes, parameters and buffers aside.

    Args:
        walk: of the graph.
        of: from ids to classes.
    """
    fixed, channels = set[fx.Node](), FixedChannels(walk, of)
    readers: dict[fx.Node, list[Reader]] = {}
    for reader in walk.readers:
        readers.setdefault(reader.node, []).append(reader)
    for node in walk.graph.nodes:
        own = readers.get(node, ())
        computed = node.op == "call_function" and (
            _is_fixed(walk, node, fixed, own) or channels.are_all(node, fixed, own)
        )
        if computed or (node.op == "get_attr" and not walk.is_written(node)):
            fixed.add(node)
        elif node.op == "call_function" and may_write(node):
            written_over = {other for target in _changed(node) for other in walk.sharing(target)}
            fixed -= written_over
            channels.forget(written_over)
    return fixed


def _is_fixed(walk: Walk, node: fx.Node, fixed: Collection[fx.Node], readers: Sequence[Reader]) -> bool:
    if node.target in _SIZES or _is_known(walk, node, walk.env.get(node)):
        return True
    if REGISTRY.rule(node.target) is None:
        return False
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and bound(node).get("train") is not False:
        return False
    moving = [operand for operand in node.all_input_nodes if operand not in fixed]
    return not moving or (len(moving) == 1 and bool(readers) and _reads_constants(node, moving[0], readers))


def _reads_constants(node: fx.Node, data: fx.Node, readers: Sequence[Reader]) -> bool:
    """Whether a layer of which only the input is not fixed has weights on constants of it alone."""
    call = REGISTRY.call(node)
    if isinstance(call, Recurrent | RecurrentCell):
        first = [weight for weight, _ in call.first_layer] if isinstance(call, Recurrent) else [call.w_ih]
        if data is not call.data or data in pytree.tree_leaves(call.hx):
            return False
        readers = [reader for reader in readers if reader.source in {str(weight.target) for weight in first}]
        if len(readers) != len(first):
            return False
    elif len(readers) != 1 or readers[0].rows is None:
        return False
    return all(map(_reads_known, readers))


def _reads_known(reader: Reader) -> bool:
    if reader.constant is None:
        return False
    known = ~np.isnan(reader.constant) if reader.mapped is None else ~np.isnan(reader.constant) | reader.mapped
    return not bool((reader.used.columns_of_rows() & ~known).any())


def _is_known(walk: Walk, node: fx.Node, value: Result) -> bool:
    """Whether all of a value is known, in numbers or as a constant of positions."""
    if not isinstance(value, Value):
        return False
    shape = reduced_shape(value.axes)
    where = torch.zeros(shape, dtype=torch.bool) if value.facts is None else value.facts.where.expand(shape)
    maps = walk.maps.get(node)
    if maps is not None and maps.fits(shape):
        where = where | maps.laid(len(shape))[0]
    return bool(where.all())


_SIZES = (aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int)


def useful_nodes(walk: Walk, reached: Collection[fx.Node], fixed: Collection[fx.Node]) -> set[fx.Node]:
    """The nodes that what is returned or written depends on, and that are not fixed.

    Args:
        walk: of the graph.
        reached: the nodes that stay.
        fixed: the nodes that give the same for every input.
    """
    useful: set[fx.Node] = set()
    for node in reversed(walk.graph.nodes):
        if node not in fixed and node in reached:
            ends = node.op == "output" or any(user in useful for user in node.users)
            if ends or (node.op == "call_function" and may_write(node) and _is_seen(walk, node, useful)):
                useful.add(node)
    return useful


def _changed(node: fx.Node) -> list[fx.Node]:
    """What a node writes to."""
    return written(node) if is_mutating(node) else node.all_input_nodes


def _is_seen(walk: Walk, node: fx.Node, useful: Collection[fx.Node]) -> bool:
    """Whether what a node writes is seen from outside, or read behind it by what is useful."""
    changed = [other for target in _changed(node) for other in walk.sharing(target) if other is not node]
    return any(o.op != "call_function" or any(user in useful for user in (o, *o.users)) for o in changed)
