"""Channels that give the same for every input, though not in one number: hidden units that read nothing that changes.

A unit of which only biases are left has other states at every step, whatever comes in. Facts do not hold them, so what
follows is told here: through movements of data and through what acts on every entry by itself, into layers that read
nothing else.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import fx

from fxprune.channels.ids import Mask, Vector
from fxprune.channels.readers import Reader
from fxprune.channels.registry import REGISTRY
from fxprune.channels.rules.recurrent import Recurrent, RecurrentCell
from fxprune.channels.values import Stack, Value
from fxprune.channels.walk import Walk

aten = torch.ops.aten
_JOINS = (aten.cat.default, aten.stack.default)
# what gives entries of its operand, or means of them over what is no channel
_MOVES = (
    operator.getitem, aten.select.int, aten.slice.Tensor, aten.narrow.default, aten.unbind.int, aten.transpose.int,
    aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.clone.default,
    aten.contiguous.default, aten.mean.dim, aten.sum.dim_IntList,
)  # fmt: skip
_NONE = np.zeros(0, np.int64)


class FixedChannels:
    """By node the classes of its channels that no input changes, as they are found.

    Args:
        walk: of the graph.
        of: from ids to classes.
    """

    def __init__(self, walk: Walk, of: Callable[[Vector], Vector]) -> None:
        self._walk, self._of = walk, of
        self._found: dict[fx.Node, Vector] = {}

    def forget(self, nodes: Collection[fx.Node]) -> None:
        """What is written over is as it was no more."""
        for node in nodes:
            self._found.pop(node, None)

    def are_all(self, node: fx.Node, fixed: Collection[fx.Node], readers: Sequence[Reader]) -> bool:
        """Find those of a node that is not fixed for another reason; whether it has no other channels.

        Args:
            node: the node; all before it were asked for, or are fixed.
            fixed: nodes that give the same for every input.
            readers: those of the node.
        """
        if REGISTRY.rule(node.target) in (Recurrent, RecurrentCell):
            found = self._units(node, fixed, readers)
        elif any(operand in self._found for operand in node.all_input_nodes):
            found = self._passed_on(node, fixed, readers)
        else:
            return False
        if not len(found):
            return False
        self._found[node] = found
        parts = self._parts(node)
        return bool(parts) and all(any(np.isin(classes, found).all() for classes in part) for part in parts)

    def _values(self, node: fx.Node) -> list[Value]:
        """A node's results, those of the parts of stacks."""
        value = self._walk.env.get(node)
        tensors = [each for each in (value if isinstance(value, list) else [value]) if each is not None]
        return [part for each in tensors for part in (each.parts if isinstance(each, Stack) else [each])]

    def _parts(self, node: fx.Node) -> list[list[Vector]]:
        """The classes on the axes of each result."""
        axes = [[axis.ids for axis in value.axes if len(axis) == 1] for value in self._values(node)]
        return [[self._of(ids) for ids in vectors if ids is not None] for vectors in axes]

    def _classes(self, node: fx.Node) -> Vector:
        return np.concatenate([_NONE, *(classes for part in self._parts(node) for classes in part)])

    def _known(self, node: fx.Node, fixed: Collection[fx.Node], classes: Vector) -> Mask:
        """Which of these channels of an operand no input changes."""
        if node in fixed:
            return np.ones(classes.shape, bool)
        found: Mask = np.isin(classes, self._found.get(node, _NONE))
        return found

    def _passed_on(self, node: fx.Node, fixed: Collection[fx.Node], readers: Sequence[Reader]) -> Vector:
        """Channels of a node that an operand has as well, or that a layer computes from such."""
        operands = node.all_input_nodes
        moving = [operand for operand in operands if operand not in fixed]
        if node.target in _JOINS:
            classes = np.concatenate([self._classes(operand) for operand in operands])
            known = np.concatenate([self._known(operand, fixed, self._classes(operand)) for operand in operands])
            return np.intersect1d(self._classes(node), np.setdiff1d(classes[known], classes[~known]))
        if node.target in _MOVES or torch.Tag.pointwise in getattr(node.target, "tags", ()):
            found = self._classes(node)
            for operand in moving:
                found = np.intersect1d(found, self._found.get(operand, _NONE))
            return found
        if len(moving) == 1 and len(readers) == 1 and readers[0].rows is not None:
            rows = self._of(readers[0].rows)
            changes = readers[0].used.rows_with(~self._constant(readers[0], moving[0], fixed))
            return np.setdiff1d(rows[~changes], rows[changes])
        return _NONE

    def _constant(self, reader: Reader, data: fx.Node, fixed: Collection[fx.Node]) -> Mask:
        """Which columns [groups, columns] of a reader no input changes."""
        found = self._known(data, fixed, self._of(reader.columns))
        return found & False if reader.constant is None else found | ~np.isnan(reader.constant)

    def _units(self, node: fx.Node, fixed: Collection[fx.Node], readers: Sequence[Reader]) -> Vector:
        """Hidden units whose gates read nothing that changes, and that start so where they carry what they were on."""
        call = REGISTRY.call(node)
        assert isinstance(call, Recurrent | RecurrentCell)
        by_weight = {reader.source: reader for reader in readers}
        beside = 2 if isinstance(call, Recurrent) and call.bidirectional else 1
        start = list(call.hx) if call.is_lstm else [call.hx]
        numbers, found, changing = self._numbers(node), _NONE, _NONE
        below = found
        for number, direction in enumerate(call.directions):
            weights = [direction.inputs, direction.states, direction.projection]
            own = [by_weight.get(str(weight.target)) for weight in weights if weight is not None]
            layers = [reader for reader in own if reader is not None and reader.constant is not None]
            if len(layers) < len(own):
                return _NONE
            if number % beside == 0:
                below = np.setdiff1d(found, changing)
            states, cells = (self._of(reader.columns[0]) for reader in (layers[1], layers[-1]))
            columns = self._constant(layers[0], call.data, fixed)
            if number >= beside:
                columns = np.isin(self._of(layers[0].columns), below) | ~np.isnan(np.asarray(layers[0].constant))
            starts = self._known(start[0], fixed, states)
            given = np.isin(states, numbers), np.isin(cells, numbers)
            fresh = ~layers[0].used.rows_with(~columns).reshape(call.kind.gates, -1).any(0)
            if call.kind.carries:
                fresh &= self._known(start[-1], fixed, cells)
            fresh |= given[1]
            while True:
                whole = fresh if len(layers) < 3 else ~layers[2].used.rows_with(~fresh[None])[0]
                read = layers[1].used.rows_with(~((whole | given[0]) & starts)[None])
                left = fresh & (given[1] | ~read.reshape(call.kind.gates, -1).any(0))
                if np.array_equal(left, fresh):
                    break
                fresh = left
            found = np.concatenate([found, states[whole | given[0]], cells[fresh]])
            changing = np.concatenate([changing, states[~(whole | given[0])], cells[~fresh]])
        return np.setdiff1d(found, changing)

    def _numbers(self, node: fx.Node) -> Vector:
        """The classes of units that are one number in all results of a recurrent call."""
        known, unknown = [_NONE], [_NONE]
        for part in self._values(node):
            ids = part.axes[-1].ids
            if ids is None:
                continue
            where = torch.zeros(len(ids), dtype=torch.bool)
            if part.facts is not None:
                where = part.facts.where.reshape(-1, part.facts.where.shape[-1]).all(0).expand(len(ids))
            known.append(self._of(ids)[where.numpy()])
            unknown.append(self._of(ids)[~where.numpy()])
        return np.setdiff1d(np.concatenate(known), np.concatenate(unknown))
