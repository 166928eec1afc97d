"""Maps that are added to the result of a layer: what channels contributed that are constants of positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.channels.axes import ONE, Axis
from fxprune.channels.coupling import Coupling
from fxprune.channels.positions import Window
from fxprune.channels.readers import Reader
from fxprune.channels.rules.convolutions import Convolution
from fxprune.channels.rules.normalization import BatchNorm
from fxprune.channels.values import Value
from fxprune.channels.walk import Result
from fxprune.errors import FinalizeError
from fxprune.graph.names import locate
from fxprune.graph.plan import ChannelPlan
from fxprune.graph.traced import TracedModule
from fxprune.torch_internals import FakeTensor

aten = torch.ops.aten


class Builder:
    """Inserts calls behind a node, one after the other, and works out their results.

    Args:
        after: the node; its device is theirs.
    """

    def __init__(self, after: fx.Node) -> None:
        sample = after.meta["val"]
        assert isinstance(sample, FakeTensor)
        self.device, self._dtype = sample.device, sample.dtype
        self.last = after
        self._mode = sample.fake_mode

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self.last.graph.inserting_after(self.last):
            self.last = self.last.graph.call_function(target, args, kwargs)
        given, named = fx.node.map_arg((args, kwargs), lambda operand: operand.meta["val"])
        with self._mode:
            self.last.meta["val"] = target(*given, **named)
        return self.last

    def read(self, name: str, shape: Sequence[int]) -> fx.Node:
        """A read of a buffer of the node's type."""
        with self.last.graph.inserting_after(self.last):
            node = self.last.graph.get_attr(name)
        with self._mode:
            node.meta["val"] = torch.empty(tuple(shape), dtype=self._dtype, device=self.device)
        self.last = node
        return node

    def size(self, node: fx.Node, dim: int) -> Any:
        """The size of a value along one axis: a number, or the node of a free one."""
        size = node.meta["val"].shape[dim]
        return size if type(size) is int else self(aten.sym_size.int, node, dim)


def add_zero_maps(traced: TracedModule, coupling: Coupling, plan: ChannelPlan) -> None:
    """Create the maps of positions that a stored plan lists, as zeros: what they add depends on the values."""
    pairs = {reader.node.name: (reader, twin) for reader, twin in coupling.readers()}
    for name, (layer, padded, _) in plan.positions.items():
        if layer not in pairs or padded not in pairs:
            raise FinalizeError(
                f"the plan adds a map to `{layer}`, which the module has not: it belongs to another one."
            )
        (reader, twin), (source, source_twin) = pairs[layer], pairs[padded]
        assert reader.rows is not None
        windows, result = Convolution.parse(source.node).windows, reader.node.meta["val"]
        shape = reader.rows.size, *(window.count for window in windows)
        value = torch.zeros(shape, dtype=result.dtype, device=result.device)
        other = None if source_twin is None else source_twin.node
        add_map(traced, coupling, reader, twin, name, value, windows, source.node, other)


def add_map(
    traced: TracedModule, coupling: Coupling, reader: Reader, twin: Reader | None, name: str, value: Tensor,
    windows: Sequence[Window], source: fx.Node, source_twin: fx.Node | None,
) -> None:  # fmt: skip
    """Add a map to the result of a layer in every graph.

    Args:
        traced, coupling: the module and its relations.
        reader, twin: the layer in the eval graph and in the train graph, if there is one.
        name: that the map is held under.
        value: [rows, pairs along each axis of space].
        windows: of the padded convolution whose border it is.
        source, source_twin: that convolution in either graph.
    """
    assert reader.rows is not None
    owner, attribute = locate(traced, name)
    owner.register_buffer(attribute, value)
    rows = reader.rows.reshape(-1)
    own = rows if rows.size > 1 else None
    coupling.tensors[name] = value
    coupling.parameters[name] = [own, *[None] * len(windows)]
    for layer, padded in ((reader, source), (twin, source_twin)):
        if layer is not None and padded is not None:
            walk = next(walk for walk in coupling.walks.values() if walk.graph is layer.node.graph)
            _read_map(layer.node, name, walk.env, ONE if own is None else Axis.of(own), windows, padded)


def _read_map(
    node: fx.Node, name: str, env: dict[fx.Node, Result], rows: Axis, windows: Sequence[Window], source: fx.Node
) -> None:
    """Add the buffer `name` to the result of a layer, the place of every position's pair along each axis of space.

    Behind a batch norm by stored statistics it is the map as the norm scales it: runtimes fold the norm into the layer.
    """
    norm = _norm_behind(node)
    node = node if norm is None else norm.node
    build, users = Builder(node), list(node.users)
    data = Convolution.parse(source).data
    counts = [window.count for window in windows]
    found, axes = build.read(name, (rows.size, *counts)), [rows, *map(Axis.plain, counts)]
    env[found] = Value(tuple(axes))
    if norm is not None:
        found = build(aten.mul.Tensor, found, _scale(build, norm, len(windows), env, rows))
        env[found] = Value(tuple(axes))
    for at, window in enumerate(windows):
        place = _places(build, window, build.size(data, at + 2), build.size(node, at + 2))
        found = build(aten.index_select.default, found, at + 1, place)
        axes[at + 1] = Axis.plain(found.meta["val"].shape[at + 1])
        env[found] = Value(tuple(axes))
    total = build(aten.add.Tensor, node, found)
    total.meta, env[total] = dict(node.meta), env[node]
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user in users)


def _norm_behind(node: fx.Node) -> BatchNorm | None:
    """The batch norm by stored statistics that alone reads a value."""
    reader = next(iter(node.users), None)
    if len(node.users) != 1 or reader is None or reader.target is not aten.batch_norm.default:
        return None
    norm = BatchNorm.parse(reader)
    has_statistics = norm.running_mean is not None and norm.running_var is not None
    return norm if has_statistics and norm.data is node and not norm.training else None


def _scale(build: Builder, norm: BatchNorm, space: int, env: dict[fx.Node, Result], rows: Axis) -> fx.Node:
    """What a norm multiplies its channels with, laid out as a map."""
    variance = build(aten.add.Tensor, norm.running_var, norm.eps)
    scale = build(aten.rsqrt.default, variance)
    env[variance] = env[scale] = Value((rows,))
    if norm.weight is not None:
        scale = build(aten.mul.Tensor, scale, norm.weight)
        env[scale] = Value((rows,))
    laid = build(aten.view.default, scale, [-1, *[1] * space])
    env[laid] = Value((rows, *[ONE] * space))
    return laid


def _places(build: Builder, window: Window, size: Any, length: Any) -> fx.Node:
    """The place of every position's pair, int64 [length].

    Args:
        build: inserts the nodes that compute it.
        window: the padded convolution along the axis.
        size, length: of the input and of the result along the axis, a number or the node of one.
    """
    first = build(aten.arange.default, length, device=build.device, pin_memory=False)
    first = build(aten.mul.Tensor, first, window.stride) if window.stride > 1 else first
    first = build(aten.sub.Tensor, first, window.before)  # where the first tap falls
    past = build(aten.add.Tensor, first, window.dilation * (window.taps - 1) + window.dilation)
    past = build(aten.sub.Tensor, past, size)  # by how much the last one falls outside, and a tap's distance - 1
    if window.dilation > 1:
        first = build(aten.div.Tensor_mode, first, window.dilation, rounding_mode="floor")
        past = build(aten.div.Tensor_mode, past, window.dilation, rounding_mode="floor")
    low = build(aten.clamp.default, build(aten.neg.default, first), 0, window.low)
    high = build(aten.clamp.default, past, 0, window.high)
    return build(aten.add.Tensor, build(aten.mul.Tensor, low, window.high + 1), high)
