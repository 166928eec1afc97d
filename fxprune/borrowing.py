"""Tensors that stay in parts with all processes while the first one works with a whole module.

The first process has shapes and dtypes; the values of a tensor come to it, whole, when an operator reads them, and are
dropped when others come. What it makes of them in their size goes back to the processes in parts. The others serve.
"""

from __future__ import annotations

import functools
import itertools
import weakref
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor
from torch.distributed.tensor import DTensor

from fxprune.errors import ShardingError
from fxprune.sharding import (
    Layout,
    as_parts,
    check_values,
    device_of,
    failed_somewhere,
    part,
    sent_as,
    sent_object,
    whole,
)
from fxprune.torch_internals import storage_users
from fxprune.wrapper_tensors import SERIALS, View, WrapperTensor

SMALL = 2**16  # bytes: a tensor of fewer is kept whole
ROOM = 2**25  # bytes of whole tensors that are kept for the next operator; the largest one, where that is more

aten = torch.ops.aten
_Ready = TypeVar("_Ready")
_ALIKE = {aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default}
# pointwise ones that give the same bits for a part as for the whole
_BY_PARTS = {
    aten.mul.Tensor, aten.div.Tensor, aten.neg.default, aten.abs.default, aten.logical_not.default, aten.isnan.default,
    aten.logical_and.default, aten.logical_or.default, aten.logical_xor.default, aten.bitwise_not.default,
    aten._to_copy.default, aten.where.self, aten.masked_fill.Scalar,
    *(getattr(aten, name).Scalar for name in ("eq", "ne", "lt", "le", "gt", "ge")),
    *(getattr(aten, name).Tensor for name in ("eq", "ne", "lt", "le", "gt", "ge")),
}  # fmt: skip
_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.convolution.default}


class _Cell:
    """The values of one borrowed tensor and of what shares its memory.

    Attributes:
        number: of the parts that hold them; None while these are not what is `held`.
        held: the whole, while it is here.
        digest: of the whole, once something may have seen its memory.
    """

    def __init__(self, loans: Loans, number: int | None, like: int, held: Tensor | None, form: Tensor) -> None:
        self.loans, self.number, self.like = loans, number, like
        self.form = form  # on the device "meta"
        self.digest: int | None = None
        self.serial = next(SERIALS)
        self.held: Tensor | None = None
        if held is not None:
            self.hold(held)

    def hold(self, values: Tensor) -> None:
        """Have the whole here."""
        self.held, self.digest = values, None
        self.users = storage_users(values)  # others than those to come, such as what it is a view of

    def __del__(self) -> None:
        if self.number is not None:
            self.loans.release(self.number)


class Borrowed(WrapperTensor):
    """A tensor whose values the processes of a module hold in parts; views of it are borrowed, too."""

    _cell: _Cell

    @staticmethod
    def __new__(cls, cell: _Cell, views: tuple[View, ...] = (), form: Tensor | None = None) -> Borrowed:
        made = cls._wrapped(cell.form if form is None else form, cell.loans.device, views)
        made._cell = cell
        return made

    def _viewed(self, views: tuple[View, ...], form: Tensor) -> Borrowed:
        return type(self)(self._cell, views, form)

    @classmethod
    def _result(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is aten.clone.default and not args[0]._views:
            return cls(args[0]._cell.loans.copied(args[0]._cell))
        return _computed(func, args, kwargs)

    @property
    def data(self) -> Tensor:
        """The same values, without gradients."""
        return Borrowed(self._cell, self._views, self._form)

    @data.setter
    def data(self, values: Tensor) -> None:
        if values.shape != self.shape or values.dtype != self.dtype:
            raise ShardingError(f"a borrowed tensor of shape {tuple(self.shape)} cannot become {tuple(values.shape)}.")
        if isinstance(values, Borrowed):  # as torch does, which shares the memory then
            self._cell, self._views, self._form = values._cell, values._views, values._form
        else:
            self._cell, self._views = self._cell.loans.made(values.detach(), self._cell.like), ()
            self._form = self._cell.form

    def _plain(self) -> Tensor:
        return self._taken_of(self._cell.loans.whole(self._cell))

    def whole(self) -> Tensor:
        """All values, a plain tensor that shares the memory of this one while it is here."""
        found = self._plain()
        self._cell.loans.seen(self._cell)
        return found

    @property
    def _serial(self) -> int:
        return self._cell.serial

    def __deepcopy__(self, memo: dict[int, Any]) -> Borrowed:
        if id(self) in memo:
            found: Borrowed = memo[id(self)]
            return found
        loans = self._cell.loans
        cell = loans.made(self._plain().clone(), self._cell.like) if self._views else loans.copied(self._cell)
        copied = Borrowed(cell)
        copied.requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            vars(copied)["_is_param"] = True
        memo[id(self)] = copied
        return copied


class _Addressed(Borrowed):
    """One whose whole is read by its address, before any other one is read."""

    def data_ptr(self) -> int:
        """The address of the whole."""
        return self.whole().data_ptr()


def addressed(tensor: Tensor) -> Tensor:
    """A tensor for what reads memory by its address, one tensor at a time."""
    return _Addressed(tensor._cell, tensor._views, tensor._form) if isinstance(tensor, Borrowed) else tensor


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operator gives for whole tensors; what is as large as they are is lent to the processes."""
    flat, structure = pytree.tree_flatten((args, kwargs))
    given = [each for each in flat if isinstance(each, Borrowed)]
    loans = given[0]._cell.loans
    if func in _BY_PARTS and (cell := _by_parts(func, flat, structure)) is not None:
        return Borrowed(cell)
    wholes = {id(each._cell): loans.whole(each._cell) for each in given}
    plain = [each._taken_of(wholes[id(each._cell)]) if isinstance(each, Borrowed) else each for each in flat]
    plain_args, plain_kwargs = pytree.tree_unflatten(plain, structure)
    results = func(*plain_args, **plain_kwargs)
    written = [each for each in _written(func, args, kwargs) if isinstance(each, Borrowed)]
    for each in written:
        loans.write(each._cell, wholes[id(each._cell)])
    owners = {wholes[id(each._cell)].untyped_storage()._cdata: each for each in given}
    others = [each for each in flat if isinstance(each, Tensor) and not isinstance(each, Borrowed)]

    def result_of(found: Any) -> Any:
        if not isinstance(found, Tensor) or isinstance(found, Borrowed) or found.is_meta:
            return found
        owner = owners.get(found.untyped_storage()._cdata)
        if owner is not None:
            if any(owner is each for each in written) and found.shape == owner.shape:
                return owner
            loans.seen(owner._cell)
            return found
        if found.nbytes >= SMALL and _is_of_their_kind(func, found, given, others):
            return Borrowed(loans.made(found, given[0]._cell.like))
        return found

    return pytree.tree_map_only(Tensor, result_of, results)


@dataclass(frozen=True)
class _Part:
    """In an order: what a process holds of a tensor."""

    number: int


def _by_parts(func: Any, flat: Sequence[Any], structure: Any) -> _Cell | None:
    """What an operator gives for tensors of one shape, made by each process of its parts; None where that cannot be."""
    given = [each for each in flat if isinstance(each, Borrowed)]
    shape, loans = given[0].shape, given[0]._cell.loans
    if any(isinstance(each, Tensor) and not isinstance(each, Borrowed) for each in flat):
        return None
    if any(each._views or each.shape != shape or each.nbytes < SMALL for each in given):
        return None
    if any(isinstance(each, torch.device | torch.memory_format | torch.layout) for each in flat):
        return None
    return loans.mapped(func, [each._cell if isinstance(each, Borrowed) else each for each in flat], structure)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operator writes to."""
    schema = func._schema.arguments
    named = [(own, args[i] if i < len(args) else kwargs.get(own.name)) for i, own in enumerate(schema)]
    return pytree.tree_leaves([each for own, each in named if own.alias_info is not None and own.alias_info.is_write])


def _is_of_their_kind(func: Any, found: Tensor, given: Sequence[Borrowed], others: Sequence[Tensor]) -> bool:
    """Whether a result is made of parameters, and not of what runs through the network."""
    if func in _PRODUCTS:
        return False
    if func in _ALIKE or torch.Tag.pointwise in func.tags:
        return any(found.shape == each.shape for each in given)
    return all(each.nbytes < SMALL or not each.is_floating_point() for each in others)


def _digest(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)


def lent_as(values: Tensor, reference: Tensor) -> Tensor:
    """Values, in parts with the processes where a tensor of the same kind is."""
    if not isinstance(reference, Borrowed) or isinstance(values, Borrowed):
        return values
    return Borrowed(reference._cell.loans.made(values.detach(), reference._cell.like))


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


class Loans:
    """The parts of borrowed tensors on each process, by number; on the first one also what comes and goes.

    Args:
        tensors: DTensors, alike on every process.
        rank: of the first process.

    Raises:
        ShardingError: one has no values; on every process.
    """

    def __init__(self, tensors: Sequence[Tensor], rank: int) -> None:
        check_values(*tensors)
        self._rank = rank
        self._parts: dict[int, Tensor] = dict(enumerate(tensors))
        self._layouts = [Layout.of(each) for each in tensors if isinstance(each, DTensor)]
        self.device = device_of(self._layouts[0].mesh) if self._layouts else torch.device("cpu")
        self._numbers = itertools.count(len(tensors))
        self._users: dict[int, int] = {}
        self._released: list[int] = []
        self._here: dict[int, weakref.ref[_Cell]] = {}  # cells with wholes, the one used last at the end
        self._room = max([ROOM, *(each.nbytes for each in tensors)])
        self._lost: ShardingError | None = None
        self.failure: BaseException | None = None  # on this process, while it served; the first one knows
        self._added = 0  # bytes of parts, beside those that were there
        self.counts = Counts()

    def part(self, number: int) -> Tensor:
        """What is held of a tensor that was lent, spread as the first tensors were."""
        return self._parts[number]

    # on the first process

    def lent(self, number: int) -> Borrowed:
        """One of the first tensors."""
        tensor = self._parts[number]
        form = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        self._users[number] = self._users.get(number, 0) + 1
        return Borrowed(_Cell(self, number, number, None, form))

    def number_of(self, tensor: Borrowed) -> int:
        """Where the parts of a tensor are found, now and after the end."""
        cell = self.made(tensor._plain().contiguous(), tensor._cell.like) if tensor._views else tensor._cell
        self._settle(cell)
        assert cell.number is not None
        self._users[cell.number] += 1
        return cell.number

    def whole(self, cell: _Cell) -> Tensor:
        """The values of a cell, plain."""
        if cell.held is None:
            assert cell.number is not None
            self._make_room(cell.form.nbytes)
            cell.hold(self._called_in(cell.number))
        self._use(cell)
        assert cell.held is not None
        return cell.held

    def made(self, values: Tensor, like: int) -> _Cell:
        """A cell of new values; they are sent when there is no room for them any more."""
        self._make_room(values.nbytes)
        form = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device="meta")
        cell = _Cell(self, None, like, values, form)
        self._use(cell)
        return cell

    def mapped(self, func: Any, flat: Sequence[Any], structure: Any) -> _Cell | None:
        """A cell of what an operator gives for those of one shape, which no process has whole.

        Args:
            func: pointwise. flat, structure: its arguments, as pytree has them, cells in the place of tensors.

        Returns:
            None where the cells are not spread alike.
        """
        cells = [each for each in flat if isinstance(each, _Cell)]
        layouts = [self._layouts[each.like].with_form(each.form.shape, each.form.dtype) for each in cells]
        first = layouts[0]
        if any(
            not each.is_simple or (each.mesh, each.placements) != (first.mesh, first.placements) for each in layouts
        ):
            return None
        for cell in cells:
            self._settle(cell)
        forms = [each.form if isinstance(each, _Cell) else each for each in flat]
        args, kwargs = pytree.tree_unflatten(forms, structure)
        form, number = func(*args, **kwargs), next(self._numbers)
        order = [_Part(each.number) if isinstance(each, _Cell) and each.number is not None else each for each in flat]
        self._order("map", number, str(func), *pytree.tree_unflatten(order, structure))
        found = self._agreed(lambda: self._of_parts(str(func), *pytree.tree_unflatten(order, structure)))
        self._add(number, found)
        self._users[number] = 1
        return _Cell(self, number, cells[0].like, None, form)

    def copied(self, cell: _Cell) -> _Cell:
        """A cell of the same values, which changes by itself."""
        self._settle(cell)
        assert cell.number is not None
        self._users[cell.number] += 1
        return _Cell(self, cell.number, cell.like, None, cell.form)

    def write(self, cell: _Cell, values: Tensor) -> None:
        """Take what was written to the whole of a cell."""
        self._forget_number(cell)
        if cell.held is not values:  # for which there was no room any more
            cell.hold(values)
        self._use(cell)

    def seen(self, cell: _Cell) -> None:
        """Something has the memory of a whole, and may write to it."""
        if cell.number is not None and cell.digest is None and cell.held is not None:
            cell.digest = _digest(cell.held)

    def release(self, number: int) -> None:
        """Of the users of a number one is gone."""
        self._users[number] -= 1
        if not self._users[number]:
            self._released.append(number)

    def end(self, told: Any) -> None:
        """Let the others go on, with what they are told."""
        self._here.clear()
        self._order("end", told)

    @property
    def are_lost(self) -> bool:
        """Whether the others cannot be told anything: one is gone, or waits for something else."""
        return self._lost is not None

    def _use(self, cell: _Cell) -> None:
        self._here.pop(id(cell), None)
        self._here[id(cell)] = weakref.ref(cell)
        self.counts.wholes = max(self.counts.wholes, sum(each.form.nbytes for each in self._cells().values()))

    def _cells(self) -> dict[int, _Cell]:
        """Those whose wholes are here, the one used last at the end."""
        there = {key: found() for key, found in self._here.items()}
        return {key: cell for key, cell in there.items() if cell is not None and cell.held is not None}

    def _make_room(self, size: int) -> None:
        cells = self._cells()
        self._here = {key: self._here[key] for key in cells}
        there = sum(cell.form.nbytes for cell in cells.values())
        for key, cell in cells.items():
            if there + size <= self._room:
                return
            assert cell.held is not None
            if storage_users(cell.held) > cell.users:  # views of it are in use
                continue
            self._settle(cell)
            cell.held = None
            del self._here[key]
            there -= cell.form.nbytes

    def _settle(self, cell: _Cell) -> None:
        """See to it that the parts hold the values of a cell."""
        if cell.digest is not None and cell.held is not None and _digest(cell.held) != cell.digest:
            self._forget_number(cell)
        if cell.number is not None:
            return
        assert cell.held is not None
        values, number = cell.held, next(self._numbers)
        layout = self._layouts[cell.like].with_form(values.shape, values.dtype)
        pieces = layout.pieces(values.detach().to(self.device)) if layout.is_simple else []
        self._order("put", number, cell.like, tuple(values.shape), values.dtype)
        own = self._agreed(layout.incoming)
        self._together(lambda: self._take(number, layout, own, values, pieces))
        self._users[number] = 1
        cell.number = number

    def _called_in(self, number: int) -> Tensor:
        """The whole of what is held in parts."""
        held = self._parts[number]
        layout = Layout.of(held)  # type: ignore[arg-type]
        if not layout.is_simple:
            self._order("gather", number)
            self._agreed(lambda: layout.outgoing(part(held)))
            found: Tensor = self._together(lambda: whole(held))
            self.counts.gathered += found.nbytes - part(held).nbytes
            is_own = found.untyped_storage().data_ptr() == part(held).untyped_storage().data_ptr()  # of a copy
            return found.clone() if is_own else found.to(self.device)
        room = layout.room()
        pieces = layout.pieces(room)
        self._order("gather", number)
        own = self._agreed(lambda: layout.outgoing(part(held)))
        self.counts.gathered += self._together(lambda: layout.collect(own, room, pieces))
        return room

    def _forget_number(self, cell: _Cell) -> None:
        cell.digest = None
        if cell.number is not None:
            self.release(cell.number)
            cell.number = None

    def _order(self, *order: Any) -> None:
        released, self._released = self._released, []
        self._together(lambda: sent_object((order, released), self._rank))
        self._drop(released)

    def _together(self, work: Callable[[], Any]) -> Any:
        if self._lost is not None:
            raise self._lost
        try:
            return work()
        except BaseException as error:  # such as what a user interrupts: the others wait for the rest of it
            self._lost = ShardingError(f"the processes could not go on together: {type(error).__name__}: {error}")
            if isinstance(error, ShardingError):
                self._lost = error
            raise

    # on all

    def serve(self) -> Any:
        """Do what the first process asks for until its work ends; returns what it told."""
        while True:
            order, released = sent_object(None, self._rank)
            self._drop(released)
            match order:
                case ("gather", number):
                    self._give(number)
                case ("put", number, like, shape, dtype):
                    self._get(number, like, torch.Size(shape), dtype)
                case ("map", number, name, args, kwargs):
                    found = self._agreed(functools.partial(self._of_parts, name, args, kwargs))
                    if found is not None:
                        self._add(number, found)
                case ("end", told):
                    return told

    def _of_parts(self, name: str, args: Any, kwargs: Any) -> Tensor:
        """What an operator gives for the parts that this process holds."""
        packet, overload = name.rpartition(".")[::2]
        func = getattr(getattr(aten, packet.removeprefix("aten.")), overload)
        references = [
            self._parts[each.number] for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, _Part)
        ]
        args, kwargs = pytree.tree_map_only(_Part, lambda each: part(self._parts[each.number]), (args, kwargs))
        return as_parts(func(*args, **kwargs), references[0])

    def _add(self, number: int, found: Tensor) -> None:
        """Hold parts beside those that were there."""
        self._parts[number] = found
        self._added += part(found).nbytes
        self.counts.parts = max(self.counts.parts, self._added)

    def _give(self, number: int) -> None:
        def prepared() -> tuple[Layout, Tensor]:
            held = self._parts[number]
            layout = Layout.of(held)  # type: ignore[arg-type]
            return layout, layout.outgoing(part(held))

        ready = self._agreed(prepared)
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

        if (ready := self._agreed(prepared)) is not None:
            layout, own = ready
            self._take(number, layout, own, None, [])

    def _agreed(self, prepare: Callable[[], _Ready]) -> Any:
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
        if dist.get_rank() == self._rank:
            told = self._together(lambda: failed_somewhere(failure, self.device, self._rank))
            if failure is not None:
                raise failure
            if told is not None:
                raise ShardingError(told)
            return ready
        told = failed_somewhere(failure, self.device, self._rank)
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
            found = sent_as(values, layout.shape, layout.dtype, layout.mesh, layout.placements, self._rank)
            moved = found.nbytes
        self.counts.sent += moved
        self._add(number, found)
