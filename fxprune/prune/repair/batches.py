"""Batches cut into pieces to fit and pieces that are held back, whatever their sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from fxprune.errors import ArgumentError
from fxprune.graph.arguments import InputCheck, fixed_size
from fxprune.graph.batch import Batch, evaluated
from fxprune.graph.calls import Call, each_call
from fxprune.graph.traced import TracedModule

Weight = Callable[..., Tensor]

# Every fifth sample, the second first: two samples are enough for both parts.
_PERIOD, _HELD = 5, 1
# samples that run at once
_MOST_SAMPLES = 64


@dataclass(frozen=True, eq=False)
class Piece:
    """Inputs that run at once.

    Attributes:
        inputs: one a placeholder. counts: which rows count, [samples, ...]; None for all.
        samples: how many. first: how many samples of the same part came before.
        is_held: whether they are held back.
    """

    inputs: list[Any]
    counts: Tensor | None
    samples: int
    first: int
    is_held: bool


@dataclass
class _Part:
    """Samples that wait to be run with others of their shape."""

    is_held: bool
    first: int = 0
    waiting: list[tuple[list[Any], Tensor | None]] = field(default_factory=list)
    samples: int = 0


class Batches:
    """The inputs of a graph, cut into pieces.

    Args:
        traced: the module. graph: its graph of eval mode.
        batches: inputs, as everywhere.
        weight: gives, called like the module, which rows count.
    """

    def __init__(self, traced: TracedModule, graph: fx.Graph, batches: Any, weight: Weight | None) -> None:
        self.calls: Iterable[Call] = each_call(batches)
        self.weight = weight
        self.check = InputCheck.of(graph, traced.example_args, traced.example_kwargs)
        batch = Batch.of(graph)
        self.is_free = batch.is_free
        places = graph.find_nodes(op="placeholder")
        self.is_batch = [_leads(node, batch) for node in places]

    def __iter__(self) -> Iterator[Piece]:
        """The pieces, in the order of the samples.

        Raises:
            InputError: a batch is none that the graph holds for.
            ArgumentError: there are no two samples, or `weight` gives something else than a tensor of rows.
        """
        parts = _Part(is_held=False), _Part(is_held=True)
        seen = 0
        for call in self.calls:
            self.check(call.args, call.kwargs)
            arranged = self.check.signature.arrange(call.args, call.kwargs)
            inputs = pytree.tree_leaves(arranged)
            samples = self._samples(inputs)
            counts = self._counts(call, samples)
            for part in parts:
                yield from self._cut(part, inputs, counts, samples, seen)
            seen += samples
        for part in parts:
            yield from _run(part)
        if seen < 2:
            what = "samples" if self.is_free else "batches of the captured size"
            raise ArgumentError(
                f"batches hold {seen} {what}; at least 2 are needed, since one in five is held back. Give more; a "
                "generator can be gone through only once."
            )

    def _samples(self, inputs: list[Any]) -> int:
        if not self.is_free:
            return 1
        return next(len(each) for each, leads in zip(inputs, self.is_batch, strict=True) if leads)

    def _counts(self, call: Call, samples: int) -> Tensor | None:
        if self.weight is None:
            return None
        found = self.weight(*call.args, **call.kwargs)
        if not isinstance(found, Tensor) or not found.dim():
            raise ArgumentError(
                f"weight gave {type(found).__name__}; a tensor [samples] or [samples, positions] is needed, zero for "
                "rows that do not count."
            )
        if self.is_free and len(found) != samples:
            raise ArgumentError(
                f"weight gave a tensor of shape {tuple(found.shape)} for {samples} samples; [samples] or [samples, "
                "positions] is needed, zero for rows that do not count."
            )
        return found != 0

    def _cut(self, part: _Part, inputs: list[Any], counts: Tensor | None, samples: int, seen: int) -> Iterator[Piece]:
        """The samples of a batch that belong to a part; run where enough wait, or others are of another shape."""
        places = torch.arange(seen, seen + samples)
        places = ((places % _PERIOD == _HELD) == part.is_held).nonzero()[:, 0]
        for some in places.split(_MOST_SAMPLES) if len(places) else ():
            taken = (self._taken(inputs, some), _picked(counts, some)) if self.is_free else (inputs, counts)
            if part.samples and (part.samples + len(some) > _MOST_SAMPLES or not self._fits(part.waiting[0], taken)):
                yield from _run(part)
            part.waiting.append(taken)
            part.samples += len(some)

    def head(self, piece: Piece, samples: int) -> Piece:
        """The first samples of a piece; all of it where its size is fixed."""
        return piece if samples >= piece.samples else self.some(piece, torch.arange(samples))

    def some(self, piece: Piece, places: Tensor) -> Piece:
        """Some samples of a piece, by their places, which ascend; all of it where its size is fixed."""
        if not self.is_free or len(places) == piece.samples:
            return piece
        return replace(
            piece, inputs=self._taken(piece.inputs, places), counts=_picked(piece.counts, places),
            samples=len(places), first=piece.first + int(places[0]),
        )  # fmt: skip

    def _taken(self, inputs: list[Any], places: Tensor) -> list[Any]:
        return [_picked(each, places) if leads else each for each, leads in zip(inputs, self.is_batch, strict=True)]

    def _fits(self, one: tuple[list[Any], Tensor | None], other: tuple[list[Any], Tensor | None]) -> bool:
        if not self.is_free or not all(self.is_batch):
            return False
        pairs = [*zip(one[0], other[0], strict=True)] + ([] if one[1] is None else [(one[1], other[1])])
        return all(first.shape[1:] == second.shape[1:] for first, second in pairs)


def _leads(node: fx.Node, batch: Batch) -> bool:
    """Whether axis 0 of an input is the batch, which is free."""
    value = node.meta.get("val")
    if not batch.is_free or not isinstance(value, Tensor) or not value.dim() or fixed_size(value.shape[0]) is not None:
        return False
    return evaluated(value.shape[0], batch.sizes) != evaluated(value.shape[0], batch.captured)


def _picked(tensor: Any, places: Tensor) -> Any:
    return None if tensor is None else tensor[places.to(tensor.device)]


def _run(part: _Part) -> Iterator[Piece]:
    """What waits, as one piece."""
    if not part.waiting:
        return
    if len(part.waiting) == 1:
        inputs, counts = part.waiting[0]
    else:
        inputs = [torch.cat([*each]) for each in zip(*(inputs for inputs, _ in part.waiting), strict=True)]
        masks = [mask for _, mask in part.waiting if mask is not None]
        counts = torch.cat(masks) if masks else None
    yield Piece(inputs, counts, part.samples, part.first, part.is_held)
    part.first += part.samples
    part.samples, part.waiting = 0, []
