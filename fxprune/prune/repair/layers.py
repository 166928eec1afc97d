"""Readers as least squares sees them: rows of inputs and outputs, weights as tables of outputs and columns."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional


@dataclass(frozen=True, eq=False)
class ReaderCall:
    """One call of a reader.

    Attributes:
        node: the call. data: its input.
        added: the node that adds the bias to what the call gives, where the call itself does not.
        state: what a step of a recurrent cell starts from.
    """

    node: fx.Node
    data: fx.Node
    added: fx.Node | None = None
    state: fx.Node | None = None

    @property
    def end(self) -> fx.Node:
        """The node that gives the output with its bias."""
        return self.node if self.added is None else self.added


@dataclass(frozen=True, eq=False)
class Reader(abc.ABC):
    """What multiplies its input with weights of its own: a call, or several by the same weights.

    Attributes:
        node: the call, the first of several. data: its input.
        weights, biases: the parameters, by name; several where one call has several that read the same input.
        sizes: groups, outputs of each, columns of each.
        moving_mean: where there is no bias, the buffer of a batch norm right behind that takes up a mean shift.
        added: the node that adds the bias, where the call does not.
        further: the other calls, in the order of the graph.
        state: what a step of a recurrent cell starts from.
    """

    node: fx.Node
    data: fx.Node
    weights: tuple[str, ...]
    biases: tuple[str | None, ...]
    sizes: tuple[int, int, int]
    moving_mean: str | None
    added: fx.Node | None = field(default=None, kw_only=True)
    further: tuple[ReaderCall, ...] = field(default=(), kw_only=True)
    state: fx.Node | None = field(default=None, kw_only=True)

    @property
    def calls(self) -> tuple[ReaderCall, ...]:
        """All calls, in the order of the graph."""
        return ReaderCall(self.node, self.data, self.added, self.state), *self.further

    @property
    def name(self) -> str:
        """The first of the weights."""
        return self.weights[0]

    @property
    def key(self) -> Hashable:
        """The same for readers whose rows of inputs are the same."""
        return *(call.data for call in self.calls), self.sizes[0], self.sizes[2]

    @abc.abstractmethod
    def table(self, weights: Sequence[Tensor]) -> Tensor:
        """The weights, as they are stored, as [groups, outputs, columns]."""

    @abc.abstractmethod
    def stored(self, table: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        """A table as it is stored, in the shapes of `weights`."""

    def received(self, call: ReaderCall, own: Mapping[fx.Node, Any], reference: Mapping[fx.Node, Any]) -> Tensor:
        """What a call reads, of the values of the network that is fitted and of those of its reference."""
        data: Tensor = own[call.data]
        return data

    @abc.abstractmethod
    def positions(self, data: Tensor) -> tuple[int, ...]:
        """The sizes of the axes of the output that are no channels; a row is one position."""

    @abc.abstractmethod
    def inputs_at(self, data: Tensor, places: tuple[Tensor, ...]) -> Tensor:
        """The inputs at some positions, an index tensor an axis: [groups, rows, columns]."""

    def outputs_at(self, output: Tensor, places: tuple[Tensor, ...]) -> Tensor:
        """The output at some positions: [groups, rows, outputs]."""
        rows: Tensor = output[places].unflatten(1, self.sizes[:2])
        return rows.transpose(0, 1)

    def shifted(self, output: Tensor, bias: Tensor) -> Tensor:
        """The output with a bias, [groups, outputs], added."""
        return output + bias.flatten().to(output)

    @property
    def gives_products(self) -> bool:
        """Whether the call returns what least squares fits, not something made of it."""
        return True

    @property
    def reads_reference(self) -> bool:
        """Whether what it is fitted to read are values of the reference."""
        return False

    def told_by(self, call: ReaderCall) -> fx.Node:
        """The node of the reference that says what a call is to give."""
        return call.node if self.gives_products else call.data


@dataclass(frozen=True, eq=False)
class MatrixReader(Reader):
    """A product with a matrix.

    Attributes:
        order: the axes of the stored weight that hold outputs and columns.
    """

    order: tuple[int, int] = (0, 1)

    def table(self, weights: Sequence[Tensor]) -> Tensor:
        return weights[0].permute(self.order)[None]

    def stored(self, table: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        return [table[0].permute(self.order)]  # a swap of two axes undoes itself

    def positions(self, data: Tensor) -> tuple[int, ...]:
        return tuple(data.shape[:-1])

    def inputs_at(self, data: Tensor, places: tuple[Tensor, ...]) -> Tensor:
        return data[places][None]


@dataclass(frozen=True, eq=False)
class RecurrentReader(MatrixReader):
    """The weights of a recurrent layer that read its input: all gates, both directions."""

    def table(self, weights: Sequence[Tensor]) -> Tensor:
        return torch.cat([*weights])[None]

    def stored(self, table: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        return list(table[0].split([len(weight) for weight in weights]))

    @property
    def gives_products(self) -> bool:
        return False


@dataclass(frozen=True, eq=False)
class CellReader(MatrixReader):
    """The weights of a recurrent cell that read its input: all gates, at every step."""

    @property
    def gives_products(self) -> bool:
        return False


@dataclass(frozen=True, eq=False)
class ConvolutionReader(Reader):
    """A convolution of any dimension, grouped or not; columns are channels times taps.

    Attributes:
        kernel, stride, dilation: one number an axis of space.
        padding: zeros in front of and behind each axis.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    @property
    def key(self) -> Hashable:
        return super().key, type(self), self.kernel, self.stride, self.dilation, self.padding

    def table(self, weights: Sequence[Tensor]) -> Tensor:
        return weights[0].reshape(self.sizes)

    def stored(self, table: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        return [table.reshape(weights[0].shape)]

    def positions(self, data: Tensor) -> tuple[int, ...]:
        reach = [dilation * (size - 1) + 1 for dilation, size in zip(self.dilation, self.kernel, strict=True)]
        sizes = zip(self._extent(data), self.padding, reach, self.stride, strict=True)
        return len(data), *((size + sum(padding) - span) // step + 1 for size, padding, span, step in sizes)

    def _extent(self, data: Tensor) -> tuple[int, ...]:
        return tuple(data.shape[2:])

    def inputs_at(self, data: Tensor, places: tuple[Tensor, ...]) -> Tensor:
        taken = self._windows(data)[places].movedim(-1, 1)  # [rows, channels, *kernel]
        return taken.reshape(len(taken), self.sizes[0], self.sizes[2]).transpose(0, 1)

    def outputs_at(self, output: Tensor, places: tuple[Tensor, ...]) -> Tensor:
        return super().outputs_at(output.movedim(1, -1), places)

    def shifted(self, output: Tensor, bias: Tensor) -> Tensor:
        return output + bias.to(output).reshape(-1, *[1] * len(self.kernel))

    def _windows(self, data: Tensor) -> Tensor:
        """What every position reads, as a view of the padded input: [batch, *space, *kernel, channels]."""
        data, space = data.movedim(1, -1), len(self.kernel)
        if any(map(any, self.padding)):
            data = functional.pad(data, [0, 0, *(size for pair in reversed(self.padding) for size in pair)])
        if math.prod(self.kernel) > 1:  # channels of a tap lie side by side, and are read at once
            data = data.contiguous()
        for dim, (size, step, gap) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True), 1):
            data = data.unfold(dim, gap * (size - 1) + 1, step)[..., ::gap]
        return data.movedim(space + 1, -1)


@dataclass(frozen=True, eq=False)
class TransposedReader(ConvolutionReader):
    """A transposed convolution: one of stride one over an input with zeros between its entries.

    Attributes:
        spread: how far apart these entries are, an axis of space.
    """

    spread: tuple[int, ...]

    @property
    def key(self) -> Hashable:
        return super().key, self.spread

    def table(self, weights: Sequence[Tensor]) -> Tensor:
        groups, outputs, columns = self.sizes
        taps = math.prod(self.kernel)
        turned = weights[0].flatten(2).flip(2).reshape(groups, columns // taps, outputs, taps)
        return turned.transpose(1, 2).reshape(self.sizes)

    def stored(self, table: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        groups, outputs, columns = self.sizes
        taps = math.prod(self.kernel)
        turned = table.reshape(groups, outputs, columns // taps, taps).transpose(1, 2)
        return [turned.flip(3).reshape(weights[0].shape)]

    def _extent(self, data: Tensor) -> tuple[int, ...]:
        sizes = zip(data.shape[2:], self.spread, strict=True)
        return tuple((size - 1) * step + 1 for size, step in sizes)

    def _windows(self, data: Tensor) -> Tensor:
        wide = data.new_zeros(*data.shape[:2], *self._extent(data))
        entries = [slice(None, None, step) for step in self.spread]
        wide[(slice(None), slice(None), *entries)] = data
        return super()._windows(wide)


@dataclass(frozen=True, eq=False)
class NormalizationReader(Reader):
    """The gain of a normalization: one column for each output, what is normalized.

    Attributes:
        axis: the axis of the channels.
        normalized: from the input to what the gain is multiplied with.
    """

    axis: int
    normalized: Callable[[Tensor], Tensor]

    @property
    def key(self) -> Hashable:
        return self.node

    def table(self, weights: Sequence[Tensor]) -> Tensor:
        return weights[0].reshape(-1, 1, 1)

    def stored(self, table: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        return [table.reshape(weights[0].shape)]

    def positions(self, data: Tensor) -> tuple[int, ...]:
        return tuple(data.movedim(self.axis, -1).shape[:-1])

    def inputs_at(self, data: Tensor, places: tuple[Tensor, ...]) -> Tensor:
        rows: Tensor = self.normalized(data).movedim(self.axis, -1)[places]
        return rows.T[..., None]

    def outputs_at(self, output: Tensor, places: tuple[Tensor, ...]) -> Tensor:
        return super().outputs_at(output.movedim(self.axis, -1), places)
