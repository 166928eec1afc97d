"""The parts of borrowed tensors, and what every process does with its own when the first one asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor
from torch.distributed.tensor import DTensor

from fxprune.by_parts import Held, Product, called
from fxprune.errors import ShardingError
from fxprune.sharding import (
    Layout,
    as_parts,
    check_values,
    device_of,
    failed_somewhere,
    gathered_objects,
    part,
    sent_as,
    sent_object,
    whole,
)

_Ready = TypeVar("_Ready")


@dataclass
class Counts:
    """Bytes of tensors, on one process.

    Attributes:
        gathered: that went to the first process when it read a tensor; there, that came.
        sent: that came when the first process had made a tensor; there, that went.
        parts: at the most, of parts that were held beside those of the module.
        wholes: on the first process, at the most, of whole tensors that were kept between operators.
    """

    gathered: int = 0
    sent: int = 0
    parts: int = 0
    wholes: int = 0


class Serving:
    """The parts of borrowed tensors on each process, by number.

    Args:
        tensors: DTensors, alike on every process.
        rank: of the first process.

    Raises:
        ShardingError: one has no values; on every process.
    """

    def __init__(self, tensors: Sequence[Tensor], rank: int) -> None:
        check_values(*tensors)
        self.rank = rank
        self._parts: dict[int, Tensor] = dict(enumerate(tensors))
        self._layouts = [Layout.of(each) for each in tensors if isinstance(each, DTensor)]
        self.device = device_of(self._layouts[0].mesh) if self._layouts else torch.device("cpu")
        self._lost: ShardingError | None = None
        self.failure: BaseException | None = None  # on this process, while it served; the first one knows
        self._added = 0  # bytes of parts, beside those that were there
        self.counts = Counts()
        self.module: Any = None  # whose tensors they are, where it is lent
        self.prepared: dict[Any, Any] = {}  # what works keep for the next ones

    def part(self, number: int) -> Tensor:
        """What is held of a tensor that was lent, spread as the first tensors were."""
        return self._parts[number]

    def together(self, work: Callable[[], Any]) -> Any:
        """Do what sends something; where it fails nothing can be sent any more."""
        if self._lost is not None:
            raise self._lost
        try:
            return work()
        except BaseException as error:  # such as what a user interrupts: the others wait for the rest of it
            self._lost = ShardingError(f"the processes could not go on together: {type(error).__name__}: {error}")
            if isinstance(error, ShardingError):
                self._lost = error
            raise

    def serve(self) -> Any:
        """Do what the first process asks for until its work ends; returns what it told."""
        while True:
            order, released = sent_object(None, self.rank)
            self._drop(released)
            match order:
                case ("gather", number):
                    self._give(number)
                case ("put", number, like, shape, dtype):
                    self._get(number, like, torch.Size(shape), dtype)
                case ("compute", number, name, args, kwargs):
                    self._compute(number, name, args, kwargs)
                case ("ask", number, function):
                    self._answers(number, function)
                case ("work", function, given):
                    function(self, given)
                case ("end", told):
                    return told

    def _give(self, number: int) -> None:
        def prepared() -> tuple[Layout, Tensor]:
            held = self._parts[number]
            layout = Layout.of(held)  # type: ignore[arg-type]
            return layout, layout.outgoing(part(held))

        ready = self.agreed(prepared)
        if ready is None:
            return
        layout, own = ready
        if layout.is_simple:
            self.counts.gathered += layout.collect(own, None, [])
        else:
            self.counts.gathered += whole(self._parts[number]).nbytes - own.nbytes

    def _get(self, number: int, like: int, shape: torch.Size, dtype: torch.dtype) -> None:
        def prepared() -> tuple[Layout, Tensor]:
            layout = self._layouts[like].with_form(shape, dtype)
            return layout, layout.incoming()

        if (ready := self.agreed(prepared)) is not None:
            layout, own = ready
            self._take(number, layout, own, None, [])

    def _compute(self, number: int, name: tuple[str, str, str], args: Any, kwargs: dict[str, Any]) -> None:
        operands = pytree.tree_leaves((args, kwargs))
        reference = self._parts[next(each.number for each in operands if isinstance(each, Held))]

        def own(operand: Held | Product) -> Tensor:
            return part(self._parts[operand.number]) if isinstance(operand, Held) else operand.as_part_of(reference)

        def prepared() -> Tensor:
            parts = pytree.tree_map_only((Held, Product), own, (args, kwargs))
            return as_parts(called(name, *parts), reference)

        if (ready := self.agreed(prepared)) is not None:
            self._keep(number, ready)
            self.counts.sent += self._to_others * sum(each.nbytes for each in operands if isinstance(each, Product))

    def _answers(self, number: int, function: Callable[[Tensor, int], Any]) -> list[Any]:
        def prepared() -> tuple[int | None, Any]:
            held = self._parts[number]
            start = Layout.of(held).first_row  # type: ignore[arg-type]
            return start, None if start is None else function(part(held), start)

        if (ready := self.agreed(prepared)) is None:
            return []
        told = self.together(lambda: gathered_objects(ready, self.rank))
        is_first = told is not None
        self.counts.gathered += sum(map(_size, told if is_first else [ready])) - (_size(ready) if is_first else 0)
        return [answer for start, answer in sorted(told or [], key=lambda each: each[0] or 0) if start is not None]

    @property
    def _to_others(self) -> int:
        """How often what the first process sends to all goes over the network; on others it comes once."""
        return dist.get_world_size() - 1 if dist.get_rank() == self.rank else 1

    def agreed(self, prepare: Callable[[], _Ready]) -> Any:
        """What a process needs for a transfer, made before others wait for it; a collective.

        Returns:
            What `prepare` gave; None on all but the first process where it failed on one.

        Raises:
            ShardingError: on the first process, where it failed on another one.
        """
        ready, failure = None, None
        try:
            ready = prepare()
        except BaseException as error:  # whatever it is, the others wait
            failure = error
        if dist.get_rank() == self.rank:
            told = self.together(lambda: failed_somewhere(failure, self.device, self.rank))
            if failure is not None:
                raise failure
            if told is not None:
                raise ShardingError(told)
            return ready
        told = failed_somewhere(failure, self.device, self.rank)
        self.failure = failure if failure is not None else self.failure
        return ready if told is None else None

    def _drop(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            found = self._parts.pop(number)
            self._added -= part(found).nbytes if number >= len(self._layouts) else 0

    def _take(self, number: int, layout: Layout, own: Tensor, values: Tensor | None, pieces: Sequence[Tensor]) -> None:
        if layout.is_simple:
            found, moved = layout.deal(pieces, own)
        else:
            found = sent_as(values, layout.shape, layout.dtype, layout.mesh, layout.placements, self.rank)
            moved = found.nbytes
        self.counts.sent += moved
        self._keep(number, found)

    def _keep(self, number: int, found: Tensor) -> None:
        self._parts[number] = found
        self._added += part(found).nbytes
        self.counts.parts = max(self.counts.parts, self._added)


def _size(answer: Any) -> int:
    return sum(getattr(each, "nbytes", 0) for each in pytree.tree_leaves(answer))
