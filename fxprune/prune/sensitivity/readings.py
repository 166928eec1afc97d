"""Who reads the units of channel groups: contractions with weights, and products of two activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from fxprune.channels.groups import ChannelGroup, Grouping
from fxprune.channels.ids import Vector
from fxprune.channels.registry import REGISTRY
from fxprune.channels.rules.attention import Attention
from fxprune.channels.rules.contractions import Contraction
from fxprune.channels.values import Value
from fxprune.channels.walk import Result
from fxprune.prune.repair.finding import find, has_weight
from fxprune.prune.repair.layers import ConvolutionReader, Reader, TransposedReader
from fxprune.prune.repair.products import Product


@dataclass(frozen=True, eq=False)
class Reading:
    """How a contraction reads channels.

    Attributes:
        reader: the contraction. channels: [groups, channels of each], the class of each channel.
        taps: columns of a channel. rows: [groups, outputs], the class of each output; None where they have none.
    """

    reader: Reader | Product
    channels: Vector
    taps: int = 1
    rows: Vector | None = None

    def columns(self, owner: Vector, units: int) -> list[tuple[int, Tensor]]:
        """For each of its groups that reads some of the units, the columns of each unit, [units, width].

        Args:
            owner: by class the unit that it goes with, -1 for none. units: how many.
        """
        found = []
        for group, classes in enumerate(self.channels):
            own = owner[classes]
            reading = np.flatnonzero(own >= 0)
            if not len(reading) or self._goes_as_whole(group, owner, own):
                continue
            order = reading[np.argsort(own[reading], kind="stable")]
            counts = np.bincount(own[order], minlength=units)
            table = np.full((units, int(counts.max())), -1, np.int64)
            within = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
            table[own[order], within] = order
            taps = np.arange(self.taps)
            wide = np.where(table[..., None] < 0, -1, table[..., None] * self.taps + taps)
            found.append((group, torch.from_numpy(wide.reshape(units, -1))))
        return found

    def _goes_as_whole(self, group: int, owner: Vector, own: Vector) -> bool:
        """Whether the outputs of a group go with the unit that its inputs are, as those of a depthwise convolution."""
        if self.rows is None:
            return False
        rows = owner[self.rows[group]]
        return bool((rows == rows[0]).all() and rows[0] >= 0 and (own == rows[0]).all())


def readings(grouping: Grouping, graph: fx.Graph | None = None) -> list[Reading]:
    """The readers of a module's eval graph that read channels, in the order of the graph.

    Args:
        grouping: of the module. graph: a copy of its eval graph with nodes of the same names; None for that itself.
    """
    graph = grouping.plain.graphs["eval"] if graph is None else graph
    order = {node: number for number, node in enumerate(graph.nodes)}
    found = [reading for reader in find(grouping.plain, graph)[0] if (reading := _of_weight(grouping, reader))]
    values = {node.name: value for node, value in grouping.found.walks["eval"].env.items()}
    found += [reading for node in graph.nodes if (reading := _of_product(grouping, values, node))]
    return sorted(found, key=lambda reading: order[reading.reader.node])


def owners(grouping: Grouping, group: ChannelGroup) -> Vector:
    """By class, which unit of a group it goes with; -1 for none."""
    found = np.full(grouping.found.classes.count, -1, np.int64)
    at, classes = grouping.units.dying.join(group.units)
    found[classes] = at
    return found


def _of_weight(grouping: Grouping, reader: Reader) -> Reading | None:
    groups, outputs, columns = reader.sizes
    out_axis, in_axis = getattr(reader, "order", (1, 0) if isinstance(reader, TransposedReader) else (0, 1))
    vectors = {
        (axis.parameter, axis.axis): grouping.axes.vector(axis)
        for axis in grouping.axes
        if axis.parameter in reader.weights
    }
    channels = vectors.get((reader.name, in_axis))
    if channels is None:
        return None
    channels = channels.reshape(groups, -1)
    rows = vectors.get((reader.name, out_axis)) if len(reader.weights) == 1 else None
    taps = columns // channels.shape[1] if isinstance(reader, ConvolutionReader) else 1
    is_whole = rows is not None and rows.size == groups * outputs
    return Reading(reader, channels, taps, rows.reshape(groups, -1) if rows is not None and is_whole else None)


def _of_product(grouping: Grouping, values: Mapping[str, Result], node: fx.Node) -> Reading | None:
    call = REGISTRY.call(node) if node.op == "call_function" else None
    if isinstance(call, Attention):
        product = Product(node, *((each, tuple(range(_rank(each)))) for each in (call.query, call.key)))
    elif isinstance(call, Contraction) and call.labels is not None and len(call.labels.outer + call.labels.inner) == 2:
        labels = call.labels
        if has_weight(call):  # of a layer, which is no product of two activations
            return None
        if len(labels.contracted) != 1 or not {*labels.batch} <= {*labels.left} & {*labels.right}:
            return None
        orders = [
            tuple(own.index(label) for label in labels.batch + position + labels.contracted)
            for own, position in ((labels.left, labels.outer), (labels.right, labels.inner))
        ]
        product = Product(node, (call.left, orders[0]), (call.right, orders[1]))
    else:
        return None
    ids = [_ids(values, operand, order[-1]) for operand, order in (product.left, product.right)]
    if any(each is None for each in ids):
        return None
    channels = grouping.found.of(ids[0])  # type: ignore[arg-type]
    return Reading(product, channels[None])


def _rank(node: fx.Node) -> int:
    return len(node.meta["val"].shape)


def _ids(values: Mapping[str, Result], node: fx.Node, axis: int) -> Vector | None:
    value = values.get(node.name)
    if not isinstance(value, Value) or len(value.axes[axis]) != 1:
        return None
    return value.axes[axis].ids
