"""What all processes do alike while the first one works with a borrowed module: each a share of the work, side by side.

Whole parameters come to all of them for an operator, one after the other, as FSDP brings them; what each finds is
brought together on the first process. Before each collective the processes tell each other whether one has failed.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor

from fxprune.communication import communicating
from fxprune.serving import Serving
from fxprune.sharding import Layout, gathered_objects, part, sent_object, whole
from fxprune.wrapper_tensors import SERIALS, View, WrapperTensor

Value = TypeVar("Value")


class Team(Protocol):
    """Processes that work side by side; each calls all of this, in the same order.

    Attributes:
        is_first: whether this process is the one that has what is brought together.
        is_alone: whether there is no other one.
    """

    is_first: bool
    is_alone: bool

    def same(self, value: Value) -> Value:
        """What the first process gives, everywhere."""

    def first_of(self, value: Value | None) -> Value | None:
        """What the first of those gives that give something, everywhere."""

    def of_all(self, value: Value) -> list[Value]:
        """What each process gives, in order, on the first one; nothing on others."""

    def sum(self, value: Tensor) -> None:
        """Let the first process have the sum of what each gives, in place; of the others it is used up."""


class Alone:
    """One process, as a team: nothing is sent."""

    is_first = is_alone = True

    def same(self, value: Value) -> Value:
        """As of a team."""
        return value

    def first_of(self, value: Value | None) -> Value | None:
        """As of a team."""
        return value

    def of_all(self, value: Value) -> list[Value]:
        """As of a team."""
        return [value]

    def sum(self, value: Tensor) -> None:
        """As of a team."""


class _Ended(BaseException):
    """Another process has failed; the first one knows."""


class Processes:
    """All processes of the default group, while the first one works with a borrowed module.

    Args:
        serving: the parts that this process holds.

    Attributes:
        place, count: of this process among all, the first one at 0.
    """

    def __init__(self, serving: Serving) -> None:
        self._serving, self._rank = serving, serving.rank
        self.count = dist.get_world_size()
        self.place = (dist.get_rank() - self._rank) % self.count
        self.is_first, self.is_alone = not self.place, self.count == 1
        self._is_told = False  # whether all know that one has failed
        self._there: tuple[int, Tensor] | None = None  # the whole that came last

    def carried_out(self, work: Callable[[Processes], Value]) -> Value | None:
        """Do a work that all processes do; a collective.

        Returns:
            What it gives; None on all but the first process where it failed on one.

        Raises:
            Exception: on the first process, what was raised there. ShardingError: there, it failed on another one.
        """
        try:
            result = work(self)
            self._agree(tuple)
            return result
        except _Ended:
            return None
        except BaseException as error:  # whatever it is, the others wait
            failure = error
        if not self._is_told:
            try:
                self._agree(lambda: _raise(failure))
            except _Ended:
                return None
        raise failure

    def same(self, value: Value) -> Value:
        """As of a team."""
        packed = self._brought(lambda: sent_object(_packed(value) if self.is_first else None, self._rank))
        return value if self.is_first else self._unpacked(packed)

    def first_of(self, value: Value | None) -> Value | None:
        """As of a team."""
        return self.same(next((each for each in self.of_all(value) if each is not None), None))

    def of_all(self, value: Value) -> list[Value]:
        """As of a team."""
        told = self._brought(lambda: gathered_objects(None if self.is_first else _packed(value), self._rank))
        if told is None:
            return []
        in_order = told[self._rank + 1 :] + told[: self._rank]
        return [value, *map(self._unpacked, in_order)]

    def dealt(self, values: Iterator[Value]) -> Value:
        """To each process the next one of values that the first one has; the last one again where none is left.

        Args:
            values: on others none is taken. At least one is left.
        """
        own = next(values) if self.is_first else None
        last = own
        for place in range(1, self.count):

            def taken() -> None:
                nonlocal last
                last = next(values, last) if self.is_first else None

            def send(place: int = place) -> None:
                nonlocal own
                with communicating("sending what each process works on"):
                    if self.is_first:
                        dist.send_object_list([_packed(last)], dst=(self._rank + place) % self.count)
                    elif place == self.place:
                        dist.recv_object_list(held := [None], src=self._rank)
                        own = self._unpacked(held[0])

            self._agree(taken)
            self._serving.together(send)
        assert own is not None
        return own

    def sum(self, value: Tensor) -> None:
        """As of a team."""

        def reduce() -> None:
            with communicating("adding up what each process has"):
                dist.reduce(value, self._rank)

        self._brought(reduce)
        self._count(value.nbytes if self.is_first else 0, value.nbytes)

    def whole(self, number: int) -> Tensor:
        """All of a lent tensor, on every process."""
        if self._there is not None and self._there[0] == number:
            return self._there[1]
        self._there = None
        held = self._serving.part(number)
        self._agree(lambda: Layout.of(held).room())  # type: ignore[arg-type]
        found: Tensor = self._serving.together(lambda: whole(held))
        self._count(found.nbytes - part(held).nbytes, part(held).nbytes)
        self._there = number, found
        return found

    def tensors(self, numbers: Mapping[str, int], values: Mapping[str, Tensor]) -> Callable[[str], Tensor]:
        """Gives tensors by name: those that are lent come whole whenever an operator reads them."""
        device = self._serving.device
        here = {name: value.to(device) for name, value in values.items()}

        def tensor(name: str) -> Tensor:
            return Gathered(self, numbers[name], self._serving.part(numbers[name])) if name in numbers else here[name]

        return tensor

    @property
    def device(self) -> torch.device:
        """What this process computes on."""
        return self._serving.device

    @property
    def prepared(self) -> dict[Any, Any]:
        """What works of this process keep for those that come."""
        return self._serving.prepared

    @property
    def module(self) -> Any:
        """The module whose tensors are lent, as this process has it."""
        return self._serving.module

    def _unpacked(self, packed: Any) -> Any:
        return torch.load(io.BytesIO(packed), map_location=self.device, weights_only=False)

    def _count(self, came: int, went: int) -> None:
        counts = self._serving.counts
        if self.is_first:
            counts.gathered += came
        else:
            counts.gathered += went
            counts.sent += came

    def _brought(self, transfer: Callable[[], Value]) -> Value:
        self._agree(tuple)
        found: Value = self._serving.together(transfer)
        return found

    def _agree(self, prepare: Callable[[], Any]) -> None:
        try:
            ready = self._serving.agreed(lambda: (prepare(),))
        except BaseException:
            self._is_told = True
            raise
        if ready is None:
            self._is_told = True
            raise _Ended


def _packed(value: Any) -> bytes:
    """A value whose tensors come to the device of whoever unpacks it."""
    torch.save(value, found := io.BytesIO())
    return found.getvalue()


def _raise(error: BaseException) -> None:
    raise error


class Gathered(WrapperTensor):
    """A lent tensor that every process reads at the same time."""

    _team: Processes
    _number: int
    _own_serial: int

    @staticmethod
    def __new__(cls, team: Processes, number: int, held: Tensor) -> Gathered:
        form = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device="meta")
        return cls._made(team, number, next(SERIALS), (), form)

    @classmethod
    def _made(cls, team: Processes, number: int, serial: int, views: tuple[View, ...], form: Tensor) -> Gathered:
        made = cls._wrapped(form, team.device, views)
        made._team, made._number, made._own_serial = team, number, serial
        return made

    def _viewed(self, views: tuple[View, ...], form: Tensor) -> Gathered:
        return self._made(self._team, self._number, self._own_serial, views, form)

    @classmethod
    def _result(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*pytree.tree_map_only(cls, cls.whole, args), **pytree.tree_map_only(cls, cls.whole, kwargs))

    def whole(self) -> Tensor:
        """All values, a plain tensor."""
        return self._taken_of(self._team.whole(self._number))

    @property
    def _serial(self) -> int:
        return self._own_serial
