"""Removed channels that a class cannot do without: which ones to take back, as zeros, and taking them back."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fxprune.artifacts.same_channels import same_channels
from fxprune.artifacts.working_copy import WorkingCopy, follow_parameters
from fxprune.graph.names import locate, tensor_at
from fxprune.torch_internals import ConvNd

_PARTS = (2, 3, 4)  # into which a class may cut channels by `chunk`
# name of a tensor -> axis -> the channels that are there, in ascending order
Channels = dict[str, dict[int, Tensor]]


@dataclass(frozen=True)
class _Layer:
    """The channels that several axes have in common: how many there were, which are left, and a number for them."""

    full: int
    left: tuple[int, ...]
    number: int | None = None


@dataclass(frozen=True)
class _Axis:
    tensor: str
    axis: int


def ways_to_fill_up(
    path: str,
    kept: Channels,
    shapes: Mapping[str, tuple[int, ...]],
    head_sizes: Sequence[int],
    numbers: Mapping[tuple[str, int], int] | None = None,
    decided: Collection[tuple[str, int]] = (),
    *,
    in_parts: bool = False,
) -> Iterator[Channels]:
    """Channels that the module at `path` could take back, the fewest first.

    Only channels that stay within the module, or go from it to its siblings. All of what lost some that nobody chose;
    those that give all heads the same size, for each size that a head may have had, heads as they were, or equal parts
    where there are no heads; and everything.

    Args:
        path: of the module, "" for the root.
        kept: the channels that there are.
        shapes: of the tensors, before any channel went.
        head_sizes: numbers of channels that may have made a head.
        numbers: as from `same_channels`; without, axes hold the same channels where as many, and the same, are left.
        decided: tensors and axes that hold channels which were chosen.
        in_parts: whether the module itself cuts channels into parts: then also those of a width that halves, thirds
            or quarters of some layers make, each width by itself.

    Returns:
        For each way, the channels that are there afterwards, of the axes that change.
    """
    below, siblings = _prefix(path), _prefix(path.rpartition(".")[0])
    layers = _layers(kept, shapes, numbers or {})
    own = {layer: axes for layer, axes in layers.items() if any(axis.tensor.startswith(below) for axis in axes)}
    inner = {layer: axes for layer, axes in own.items() if all(axis.tensor.startswith(siblings) for axis in axes)}
    if inner:
        unchosen = _unchosen(inner, decided) if decided else {}
        yield from sorted(
            [*_whole(unchosen), *(_cut_in_parts(inner) if in_parts else ()), *_ways(own, inner, head_sizes)],
            key=_count,
        )


def lost_by_themselves(
    kept: Channels,
    shapes: Mapping[str, tuple[int, ...]],
    numbers: Mapping[tuple[str, int], int],
    decided: Collection[tuple[str, int]],
) -> Channels:
    """All channels of what lost some that nobody chose.

    Args:
        kept, shapes, numbers: as for `ways_to_fill_up`.
        decided: tensors and axes that hold channels which were chosen.
    """
    own = _unchosen(_layers(kept, shapes, numbers), decided)
    return next(_whole(own), {})


def _unchosen(layers: Mapping[_Layer, list[_Axis]], decided: Collection[tuple[str, int]]) -> dict[_Layer, list[_Axis]]:
    """Those that lost channels which nobody chose."""
    return {
        layer: axes
        for layer, axes in layers.items()
        if not any((place.tensor, place.axis) in decided for place in axes)
    }


def _whole(layers: Mapping[_Layer, list[_Axis]]) -> Iterator[Channels]:
    """All channels of some layers, where there are any."""
    if layers:
        yield _by_name({layer: torch.arange(layer.full) for layer in layers}, layers)


def _count(channels: Channels) -> int:
    return sum(len(there) for axes in channels.values() for there in axes.values())


def _ways(
    own: dict[_Layer, list[_Axis]], inner: dict[_Layer, list[_Axis]], head_sizes: Sequence[int]
) -> Iterator[Channels]:
    for size in dict.fromkeys(head_sizes):
        headed = [layer for layer in own if layer.full % size == 0 and layer.full > size]
        most = max((len({channel % size for channel in layer.left}) for layer in headed), default=size)
        for count in dict.fromkeys((most, size)):
            filled = {layer: _even_heads(layer, headed, size, count) for layer in headed if layer in inner}
            if filled:
                yield _by_name(filled, inner)
    for size in sorted({layer.full // parts for layer in inner for parts in _PARTS if layer.full % parts == 0}):
        if size > 1 and not head_sizes:
            most = max(len(part) for layer in inner if layer.full % size == 0 for part in _parts(layer, size))
            yield _by_name({layer: _even_parts(layer, size, most) for layer in inner if layer.full % size == 0}, inner)
    yield from _whole(inner)


def _cut_in_parts(inner: dict[_Layer, list[_Axis]]) -> Iterator[Channels]:
    """Equal parts of the layers of one width, for each width and number of parts."""
    for full, parts in sorted({(layer.full, parts) for layer in inner for parts in _PARTS}):
        size = full // parts
        if full % parts or size < 2:
            continue
        layers = [layer for layer in inner if layer.full == full]
        most = max(len(part) for layer in layers for part in _parts(layer, size))
        if most < size or len(layers) < len(inner):
            yield _by_name({layer: _even_parts(layer, size, most) for layer in layers}, inner)


def _prefix(path: str) -> str:
    return f"{path}." if path else ""


def _layers(
    kept: Channels, shapes: Mapping[str, tuple[int, ...]], numbers: Mapping[tuple[str, int], int]
) -> dict[_Layer, list[_Axis]]:
    """The axes that lost channels, those of the same channels together.

    An axis without a number, of a tensor that left the graph, goes with the nearest of those that lost the same.
    """
    layers: dict[_Layer, list[_Axis]] = {}
    unnumbered: list[tuple[_Layer, _Axis]] = []
    for name, axes in kept.items():
        for axis, channels in axes.items():
            full = shapes[name][axis]
            if channels.dim() == 1 and 0 < len(channels) < full:
                layer = _Layer(full, tuple(channels.tolist()), numbers.get((name, axis)))
                if layer.number is None:
                    unnumbered.append((layer, _Axis(name, axis)))
                else:
                    layers.setdefault(layer, []).append(_Axis(name, axis))
    numbered = list(layers)
    for layer, place in unnumbered:
        alike = [other for other in numbered if (other.full, other.left) == (layer.full, layer.left)]
        nearest = max(alike, key=lambda other: _nearness(place, layers[other]), default=layer)
        layers.setdefault(nearest, []).append(place)
    return layers


def _nearness(axis: _Axis, others: Sequence[_Axis]) -> int:
    """How much of its name an axis has in common with the name of one of the others, at most."""
    return max(_parts_in_common(axis.tensor, other.tensor) for other in others)


def _parts_in_common(name: str, other: str) -> int:
    """How many parts of two dotted names are the same, from the front."""
    pairs = zip(name.split("."), other.split("."), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _even_heads(layer: _Layer, headed: list[_Layer], size: int, count: int) -> Tensor:
    """The heads that any layer of this width has left, each with the same `count` channels: first those that are left.

    Args:
        layer: the layer to fill up.
        headed: all that have heads of this size.
        size: of a head before.
        count: of its channels now.
    """
    heads = sorted({channel // size for other in headed if other.full == layer.full for channel in other.left})
    left = sorted({channel % size for channel in layer.left})
    channels = sorted([*left, *(channel for channel in range(size) if channel not in left)][:count])
    return torch.tensor([head * size + channel for head in heads for channel in channels])


def _parts(layer: _Layer, size: int) -> list[list[int]]:
    """The channels that are left of each `size` of a layer, counted from the first of them."""
    return [[c - start for c in layer.left if start <= c < start + size] for start in range(0, layer.full, size)]


def _even_parts(layer: _Layer, size: int, count: int) -> Tensor:
    """A layer in parts of `size` of which each has at least `count` channels: those that are left, then the first."""
    channels = []
    for number, left in enumerate(_parts(layer, size)):
        more = [channel for channel in range(size) if channel not in left][: max(count - len(left), 0)]
        channels += [number * size + channel for channel in sorted([*left, *more])]
    return torch.tensor(channels)


def _by_name(filled: Mapping[_Layer, Tensor], axes: Mapping[_Layer, list[_Axis]]) -> Channels:
    channels: Channels = {}
    for layer, there in filled.items():
        for axis in axes[layer]:
            channels.setdefault(axis.tensor, {})[axis.axis] = there
    return channels


@dataclass
class Hold:
    """Whether what was taken back inside a block stays."""

    kept: bool = False

    def keep(self) -> None:
        """Let it stay."""
        self.kept = True


@dataclass(frozen=True)
class _Before:
    """A tensor as it was before channels were taken back; and the groups of its layer, where it is a convolution's."""

    name: str
    tensor: Tensor
    values: Tensor
    channels: dict[int, Tensor]
    groups: int | None


@dataclass
class ZeroChannels:
    """The channels of a copy's tensors; those that are taken back are zeros, and can be given up again."""

    copy: WorkingCopy
    kept: Channels = field(init=False)
    _taken: list[_Before] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.kept = {n: dict(axes) for n, axes in self.copy.plan.kept.items() if n in self.copy.shapes}

    @property
    def any_taken(self) -> bool:
        """Whether any channel is there as zeros."""
        return bool(self._taken)

    @cached_property
    def numbers(self) -> Mapping[tuple[str, int], int]:
        """Which axes hold the same channels."""
        return same_channels(self.copy.final)

    @contextlib.contextmanager
    def taken_back(self, channels: Channels) -> Iterator[Hold]:
        """Have these channels inside the block; at its end they go, with all that was taken back inside, unless kept.

        Blocks stand inside each other as the calls of modules do.
        """
        start, hold = len(self._taken), Hold()
        for name, axes in channels.items():
            self._fill_up(name, axes)
        try:
            yield hold
        finally:
            if not hold.kept:
                self.give_up(start)

    def _fill_up(self, name: str, axes: dict[int, Tensor]) -> None:
        owner, attribute = locate(self.copy.root, name)
        tensor, before = tensor_at(self.copy.root, name), self.kept[name]
        groups = owner.groups if isinstance(owner, ConvNd) else None
        self._taken.append(_Before(name, tensor, tensor.data, before, groups))
        values = tensor.data
        for axis, channels in axes.items():
            if values.shape[axis] == len(channels):  # it was done under another of its names
                continue
            shape = list(values.shape)
            shape[axis] = len(channels)
            places = torch.searchsorted(channels, before[axis]).to(values.device)
            values = values.new_zeros(shape).index_copy_(axis, places, values)
        if isinstance(owner, ConvNd) and attribute == "weight" and values.shape[1] == 1:  # depthwise
            owner.groups = owner.groups * len(values) // len(tensor)
        tensor.data = values
        self.kept[name] = before | axes
        follow_parameters(owner)

    def give_up(self, start: int = 0) -> None:
        """Undo what was taken back, the latest first, down to the first `start` tensors."""
        while len(self._taken) > start:
            before = self._taken.pop()
            before.tensor.data = before.values
            self.kept[before.name] = before.channels
            owner, _ = locate(self.copy.root, before.name)
            if before.groups is not None:
                owner.groups = before.groups  # type: ignore[assignment]
            follow_parameters(owner)
