"""Convolutions: grouped, depthwise, transposed, of one to three dimensions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxprune.channels.axes import ONE, Axis, reduced_shape, sizes_of
from fxprune.channels.edits import Count, SetArguments
from fxprune.channels.ids import Vector
from fxprune.channels.means import has_space
from fxprune.channels.positions import MOST, PositionMaps, Spread, Window, inside, number
from fxprune.channels.ranges import Weights, note_layer
from fxprune.channels.readers import Balance, Bias, Reader
from fxprune.channels.registry import REGISTRY, Cost, OperatorCall, Traffic, register
from fxprune.channels.rules.layers import NOTHING, Layer, beside_zeros, column_facts, read_weight
from fxprune.channels.values import Value, beside
from fxprune.channels.walk import Result, Walk
from fxprune.torch_internals import ConvNd

aten = torch.ops.aten
_TRANSPOSED = (aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d)


@register(aten.conv1d, aten.conv2d, aten.conv3d, *_TRANSPOSED, aten.convolution)
@dataclass(frozen=True, eq=False)
class Convolution(OperatorCall):
    """A convolution; its weight is [outputs, inputs of a group, ...], transposed [inputs, outputs of a group, ...]."""

    data: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    padding: Any
    groups: int
    stride: Any = 1
    dilation: Any = 1
    output_padding: Any = 0
    transposed: bool = False
    modules: ClassVar = (ConvNd,)

    @property
    def shift(self) -> fx.Node | None:
        return self.bias

    @property
    def is_transposed(self) -> bool:
        return self.transposed or getattr(self.node.target, "overloadpacket", None) in _TRANSPOSED

    @property
    def row_axis(self) -> int:
        """The axis of the weight that holds the outputs (of a group, where it is transposed)."""
        return 1 if self.is_transposed else 0

    @property
    def pads(self) -> bool:
        """Whether zeros stand around the input."""
        if isinstance(self.padding, list | tuple):
            return any(self.padding)
        return self.padding not in (0, "valid")

    @property
    def space(self) -> int:
        """How many axes of space there are."""
        return len(self.weight.meta["val"].shape) - 2

    def scaled(self, weight: Tensor, factors: Tensor) -> Tensor:
        """A weight of this call times one factor for each output channel."""
        if not self.is_transposed:
            return weight * factors.view(-1, *[1] * (weight.dim() - 1))
        split = weight.unflatten(0, (self.groups, -1))
        by_group = factors.view(self.groups, 1, -1, *[1] * (weight.dim() - 2))
        scaled: Tensor = split * by_group
        return scaled.flatten(0, 1)

    @property
    def counts(self) -> tuple[int, int]:
        """Outputs and inputs of a group."""
        first, second = self.weight.meta["val"].shape[:2]
        return (second, first // self.groups) if self.is_transposed else (first // self.groups, second)

    def relate(self, walk: Walk) -> Value:
        data, weight = walk.value(self.data), walk.value(self.weight)
        channel = data.rank - self.space - 1
        mixed = [channel + 1 + at for at, window in enumerate(self.windows) if self.is_transposed or not window.is_each]
        data = walk.blur(self.node, data, mixed, "space of a convolution")
        for axis in weight.axes[2:]:
            walk.pin_axis(self.node, axis, "kernel of a convolution")
        data = self._as_met(walk, data)
        data, columns = walk.merged(self.node, self._in_groups(walk, data, channel), channel)
        if self.groups == 1 or self.is_transposed:
            joined = walk.join(self.node, [data.axes[channel], weight.axes[1 - self.row_axis]])
            columns = walk.vector(self.node, joined)
            if self.groups == 1 and data.axes[channel].carries:
                data = data.relayout(channel, joined)
        rows = self._own_rows(walk, weight)
        if self.groups > 1:
            self._relate_groups(walk, data.axes[channel], weight, columns, rows)
        bias, rows = self._joined_bias(walk, rows)
        table = self._table(weight) if walk.facts and weight.stored else None
        layer = self._layer(walk, data, channel, weight, table, rows, columns, bias)
        known = read_weight(walk, layer)
        if table is None and walk.facts:
            for axis in (*weight.axes[:2], data.axes[channel]):
                walk.pin_axis(self.node, axis, "a weight that depends on the input")
        vectors = [ids for ids in (rows, columns) if ids is not None]
        walk.aligned.append((vectors, self.groups > 1 and self.counts == (1, 1)))
        space = [Axis.plain(size) for size in walk.shape(self.node)[channel + 1 :]]
        space = [axis if axis.carries else own for axis, own in zip(data.axes[channel + 1 :], space, strict=True)]
        axes = (*data.axes[:channel], self._out_axis(rows), *space)
        result = Value(axes) if known is None else known.spread(axes, [-1] + [1] * self.space)
        if any(axis.carries for axis in space):
            shift = NOTHING if bias is None else bias.facts
            laid = None if shift is None else shift.map(lambda tensor: tensor.reshape([-1] + [1] * self.space))
            return beside_zeros(result, data.zeros.all(channel, keepdim=True), laid)
        if table is None or data.rank != self.space + 2:
            return result
        self._note_range(walk, result, table, bias)
        self._note_means(walk, result, layer)
        if self.data in walk.maps:
            self._read_maps(walk, walk.readers[-1], weight)
        return self._with_maps(walk, result, layer, walk.readers[-1])

    def _in_groups(self, walk: Walk, data: Value, channel: int) -> Value:
        """The input with ids, which all stay, where it carries no channels and is read in groups."""
        axis = data.axes[channel]
        if self.groups == 1 or self.counts == (1, 1) or axis.carries or type(axis.size) is not int or axis.size == 1:
            return data
        ids = walk.ids.fresh(axis.size)
        walk.pin(self.node, ids, "reads in groups what carries no channels")
        axes, facts = data.replaced_axis(channel, Axis.of(ids)), data.facts
        shape = reduced_shape(axes)
        return replace(data, axes=axes, facts=None if facts is None else facts.map(lambda known: known.expand(shape)))

    @property
    def windows(self) -> tuple[Window, ...]:
        """The kernel along each axis of space."""
        taps = self.weight.meta["val"].shape[2:]
        found = []
        for at, size in enumerate(taps):
            stride, dilation = (_at(argument, at) for argument in (self.stride, self.dilation))
            if self.padding == "same":
                whole = dilation * (size - 1)
                before, after = whole // 2, whole - whole // 2
            else:
                before = after = 0 if self.padding == "valid" else _at(self.padding, at)
            found.append(Window(size, stride, dilation, before, after))
        return tuple(found)

    @property
    def spreads(self) -> tuple[Spread, ...]:
        """Of a transposed convolution, the kernel along each axis of space."""
        return tuple(
            Spread(size, *(_at(each, at) for each in (self.stride, self.dilation, self.padding, self.output_padding)))
            for at, size in enumerate(self.weight.meta["val"].shape[2:])
        )

    def _as_met(self, walk: Walk, data: Value) -> Value:
        """The input with what is known of the positions that a kernel of one tap meets in its steps."""
        maps, shape = walk.maps.get(self.data), reduced_shape(data.axes)
        if maps is None or self.is_transposed or self.pads or not maps.fits(shape):
            return data
        if len(shape) != self.space + 2 or any(window.taps > 1 for window in self.windows):
            return data
        where, value = maps.met([window.stride for window in self.windows])
        return beside(data, where.view(shape), value.view(shape)) if where.any() else data

    def _read_maps(self, walk: Walk, reader: Reader, weight: Value) -> None:
        """Constants of positions that a kernel of one tap reads make a map, which can be added."""
        maps = walk.maps[self.data]
        is_each = all(window.is_each for window in self.windows) and not self.is_transposed
        if not is_each or reader.soft is None or maps.border is None:
            return
        if not maps.fits([1, reader.columns.size, *[1] * self.space]):
            return
        reader.maps, reader.mapped = maps, maps.where.numpy().reshape(reader.columns.shape) & ~reader.soft
        reader.soft = reader.soft | reader.mapped

    def _note_means(self, walk: Walk, result: Value, layer: Layer) -> None:
        """A kernel of one tap gives channels whose means over space are sums of those that it reads."""
        means, shape = walk.means.get(self.data), reduced_shape(result.axes)
        if means is None or not means.fits(layer.data.axes) or not has_space(result.axes) or layer.table is None:
            return
        if self.is_transposed or not all(window.is_each for window in self.windows):
            return
        bias = NOTHING if layer.bias_value is None else layer.bias_value.facts
        if bias is None or not bias.stored:
            return
        sums = (layer.table != 0).any(-1), layer.table.double().sum(-1)  # [groups, rows, columns]
        where, value = (each.reshape(self.groups, 1, -1) for each in (means.where, means.value))
        known = ~(sums[0] & ~where).any(-1)
        total = (sums[1] * torch.where(where, value, 0)).sum(-1)
        walk.note_means(
            self.node,
            result,
            known.reshape(shape),
            (total.reshape(-1) + bias.value.double().reshape(-1)).reshape(shape),
        )

    def _with_maps(self, walk: Walk, result: Value, layer: Layer, reader: Reader) -> Value:
        """The result with rows known by position: all that they read are constants, with zeros around."""
        windows = self.spreads if self.is_transposed else self.windows
        if not (self.pads or self.is_transposed) or number(windows) > MOST:
            return result
        facts = column_facts(layer.data, layer.dim, layer.groups, layer.column_count)
        usable = facts.known & (~facts.bordered | (facts.value == 0))
        rows = ~reader.used.rows_with(~usable) & reader.used.rows_with()
        bias = layer.bias_value
        shape = reduced_shape(result.axes)
        if not rows.any() or (bias is not None and not bias.stored) or shape != [1, rows.size, *[1] * self.space]:
            return result
        assert layer.table is not None
        group, row = (torch.from_numpy(index) for index in np.nonzero(rows))
        constant = torch.from_numpy(np.where(usable, facts.value, 0))[group]
        by_tap = torch.einsum("nct,nc->tn", layer.table[group, row].double(), constant)
        values = torch.zeros(number(windows), rows.size).double()
        where = torch.from_numpy(rows.reshape(-1))
        values[:, where] = inside(windows) @ by_tap
        if bias is not None and bias.facts is not None:
            values = values + bias.facts.value.double().reshape(1, -1)
        maps = PositionMaps(self.node, windows, where, values)
        own, by_position = maps.laid(len(shape))
        return walk.note_maps(self.node, result, maps, own, by_position)

    def _note_range(self, walk: Walk, result: Value, table: Tensor, bias: Value | None) -> None:
        """What the result lies between, where the input lies between numbers."""
        if self.data not in walk.ranges or (bias is not None and (not bias.stored or bias.facts is None)):
            return
        shift = None if bias is None or bias.facts is None else bias.facts.value
        windows = self.spreads if self.is_transposed else self.windows
        met = (self.pads or self.is_transposed) and number(windows) <= MOST
        taps = inside(windows) if met else None
        if taps is None and (self.pads or self.is_transposed):
            return
        note_layer(walk, self.node, self.data, result, Weights(table, 1, shift, taps))

    def _own_rows(self, walk: Walk, weight: Value) -> Vector | None:
        if self.groups > 1 and self.is_transposed:  # the weight's axis has those of one group alone
            outputs = self.counts[0] * self.groups
            return walk.ids.fresh(outputs) if outputs > 1 else None
        return walk.vector(self.node, weight.axes[self.row_axis])

    def _out_axis(self, rows: Vector | None) -> Axis:
        outputs = self.counts[0] * self.groups
        if outputs == 1:
            return ONE
        return Axis.plain(outputs) if rows is None else Axis.of(rows)

    def _relate_groups(
        self, walk: Walk, channels: Axis, weight: Value, columns: Vector | None, rows: Vector | None
    ) -> None:
        outputs, inputs = self.counts
        why = self._why_groups_stay(walk, weight)
        if why is not None or columns is None or rows is None:
            why = why or "a grouped convolution of what carries no channels"
            walk.pin_axis(self.node, channels, why)
            walk.pin_value(self.node, weight, why)
            walk.pin(self.node, columns, why)
            walk.pin(self.node, rows, why)
        elif outputs == inputs == 1:
            walk.ids.unify(columns, rows)
        else:
            assert weight.source is not None
            tensor = walk.parameters.tensors[weight.source]
            walk.ids.unify(walk.parameters.grouped.setdefault(tensor, columns), columns)
            shaped = columns.reshape(self.groups, inputs), rows.reshape(self.groups, outputs)
            walk.balances.append(Balance(self.node, *shaped, weight.source, self.is_transposed))
        if columns is not None and rows is not None:
            shaped = columns.reshape(self.groups, inputs), rows.reshape(self.groups, outputs)
            walk.edits.append(SetArguments(self.node, {"groups": Count(np.concatenate(shaped, axis=1))}))

    def _why_groups_stay(self, walk: Walk, weight: Value) -> str | None:
        """Why nothing of a convolution in groups can go, None where it can."""
        if self.counts == (1, 1):
            return None
        if weight.source is None:
            return "a grouped convolution whose weight is computed"
        if not all(self._reads_alike(user, read) for read in walk.reads(weight.source) for user in read.users):
            return "a grouped convolution whose weight something else reads"
        return None

    def _reads_alike(self, user: fx.Node, weight: fx.Node) -> bool:
        """Whether another node is the same convolution of something else."""
        call = REGISTRY.call(user) if user.op == "call_function" else None
        return (
            isinstance(call, Convolution)
            and call.weight is weight
            and weight not in (call.data, call.bias)
            and (call.groups, call.is_transposed) == (self.groups, self.is_transposed)
        )

    def _joined_bias(self, walk: Walk, rows: Vector | None) -> tuple[Value | None, Vector | None]:
        if self.bias is None:
            return None, rows
        bias = walk.value(self.bias)
        own = ONE if rows is None else Axis.of(rows)
        axis = walk.join(self.node, [own, bias.axes[0]])
        return bias.relayout(0, axis), axis.ids if not axis.is_one else rows

    def _table(self, weight: Value) -> Tensor:
        """The weight as [groups, rows, columns, taps]."""
        outputs, inputs = self.counts
        assert weight.facts is not None
        value = weight.facts.value
        if self.is_transposed:
            return value.reshape(self.groups, inputs, outputs, -1).transpose(1, 2)
        return value.reshape(self.groups, outputs, inputs, -1)

    def _layer(
        self, walk: Walk, data: Value, channel: int, weight: Value, table: Tensor | None, rows: Vector | None,
        columns: Vector | None, bias: Value | None,
    ) -> Layer:  # fmt: skip
        outputs, inputs = self.counts
        return Layer(
            self.node, data, channel, weight, table, rows, columns, self.groups, outputs, inputs,
            folds=not self.pads and not self.is_transposed, bias=Bias(self.bias, "bias"), bias_value=bias,
            row_axes=(self.row_axis,),
        )  # fmt: skip

    def costs(self, env: Mapping[fx.Node, Result]) -> Sequence[Cost]:
        """One product a weight, batch entry and position: of the output, transposed of the input."""
        node = self.data if self.is_transposed else self.node
        weight, moved, value = sizes_of(self.weight), sizes_of(node), env.get(node)
        positions = math.prod(moved[-self.space :])
        batch = math.prod(moved) // positions // moved[-self.space - 1]
        axes = [*value.axes] if isinstance(value, Value) else []
        if axes:  # those of space may carry channels of other layers; rows and columns are known by the reader
            del axes[-self.space - 1]
        return [Cost(float(math.prod(weight) * positions * batch), (*axes, ONE, ONE))]

    @property
    def traffic(self) -> Traffic:
        return Traffic(*(math.prod(sizes_of(operand)) for operand in (self.node, self.data, self.weight)))

    @classmethod
    def module_sizes(cls, module: nn.Module) -> dict[str, Any]:
        assert isinstance(module, ConvNd)
        first, second = module.weight.shape[:2]
        groups = module.groups
        inputs, outputs = (first, second * groups) if module.transposed else (second * groups, first)
        return {"in_channels": inputs, "out_channels": outputs, "groups": groups}


def _at(argument: Any, axis: int) -> int:
    """An argument of a convolution for one axis of space: one number stands for all."""
    if not isinstance(argument, list | tuple):
        return int(argument)
    return int(argument[axis if len(argument) > 1 else 0])
