"""Tensors that stay in parts with all processes while the first one works with a whole module.

The first process has shapes and dtypes; the values of a tensor come to it, whole, when an operator reads them, and are
dropped when others come. What it makes of them in their size goes back to the processes in parts. The others serve.
What can be computed from parts alone (`fxprune.by_parts`) each process computes from its own, and no whole comes.
"""

from __future__ import annotations

import functools
import itertools
import weakref
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fxprune.by_parts import (
    ALIKE,
    Held,
    Product,
    as_product,
    from_bits,
    is_by_entries,
    is_reducing,
    is_writing,
    name_of,
    nonzero_bits,
    reduced,
    reduced_part,
)
from fxprune.errors import ShardingError
from fxprune.serving import Serving
from fxprune.sharding import Layout, part, sent_object, whole
from fxprune.torch_internals import storage_users
from fxprune.wrapper_tensors import SERIALS, View, WrapperTensor

Result = TypeVar("Result")

SMALL = 2**16  # bytes: a tensor of fewer is kept whole
ROOM = 2**25  # bytes of whole tensors that are kept for the next operator; the largest one, where that is more

aten = torch.ops.aten
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
    if (by_processes := _by_parts(func, args, kwargs, given)) is not None:
        return by_processes
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


def _by_parts(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: Sequence[Borrowed]) -> Any:
    """What an operator gives where every process can compute its part of it; None where wholes are needed, or here."""
    cells = [each._cell for each in given]
    first, loans = cells[0], cells[0].loans
    if any(each._views for each in given) or not all(loans.is_cut_alike(first, cell) for cell in cells):
        return None
    if func not in ALIKE and all(cell.held is not None for cell in cells):
        return None
    if is_reducing(func, args, kwargs):
        return reduced(func, asked(given[0], functools.partial(reduced_part, name_of(func))))
    writes = is_writing(func)
    if not is_by_entries(func, args, kwargs) or (writes and (args[0] is not given[0] or first.held is not None)):
        return None
    shape = first.form.shape
    others = [each for each in args if isinstance(each, Tensor) and not isinstance(each, Borrowed)]
    if any(each.dim() > len(shape) or torch.broadcast_shapes(each.shape, shape) != shape for each in others):
        return None
    cell = loans.computed(name_of(func), args, kwargs, first)
    if not writes:
        return Borrowed(cell)
    loans.take_over(first, cell)
    return given[0]


def asked(tensor: Tensor, function: Callable[[Tensor, int], Any]) -> list[Any]:
    """What a function gives for the parts of a tensor, computed where these are; of one that is whole, one part.

    Args:
        tensor: any.
        function: from a part and its first index along axis 0; pickled, and so is what it gives, which is small.

    Returns:
        By part, in the order of the indices. There is more than one only of tensors that are cut along axis 0.
    """
    if not isinstance(tensor, Borrowed):
        return [function(tensor.detach(), 0)]
    cell = tensor._cell
    if tensor._views or cell.held is not None or not cell.loans.is_in_rows(cell):
        return [function(tensor._plain().detach(), 0)]
    return cell.loans.asked(cell, function)


def nonzero(tensor: Tensor) -> Tensor:
    """Which entries of a tensor are not zero, plain; of parts a bit of each comes here."""
    if not isinstance(tensor, Borrowed):
        return tensor != 0
    cell = tensor._cell
    if cell.held is not None or tensor.dtype != cell.form.dtype or not cell.form.is_contiguous():
        return tensor._plain() != 0
    return tensor._taken_of(from_bits(asked(Borrowed(cell), nonzero_bits)))


def lender(tensors: Iterable[Tensor]) -> Loans | None:
    """Where the first one of tensors that is borrowed is; None where none is."""
    return next((each._cell.loans for each in tensors if isinstance(each, Borrowed)), None)


def taken(tensor: Tensor) -> Tensor:
    """The values of a tensor, plain; of one that is borrowed a copy, which is kept here as long as it is used."""
    return tensor._plain().clone() if isinstance(tensor, Borrowed) else tensor


def fills_its_memory(tensor: Tensor) -> bool:
    """Whether there is nothing beside a tensor in its memory; no values are read."""
    if isinstance(tensor, Borrowed):
        return tensor._cell.form.nbytes == tensor.nbytes
    return tensor.untyped_storage().nbytes() == tensor.nbytes


def share_memory(left: Tensor, right: Tensor) -> bool:
    """Whether tensors are views of one memory; no values are read."""
    if isinstance(left, WrapperTensor):
        return isinstance(right, WrapperTensor) and left._serial == right._serial
    if isinstance(right, WrapperTensor):
        return False
    return left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operator writes to."""
    schema = func._schema.arguments
    named = [(own, args[i] if i < len(args) else kwargs.get(own.name)) for i, own in enumerate(schema)]
    return pytree.tree_leaves([each for own, each in named if own.alias_info is not None and own.alias_info.is_write])


def _is_of_their_kind(func: Any, found: Tensor, given: Sequence[Borrowed], others: Sequence[Tensor]) -> bool:
    """Whether a result is made of parameters, and not of what runs through the network."""
    if func in _PRODUCTS:
        return False
    if func in ALIKE or torch.Tag.pointwise in func.tags:
        return any(found.shape == each.shape for each in given)
    return all(each.nbytes < SMALL or not each.is_floating_point() for each in others)


def _digest(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)


def lent_as(values: Tensor, reference: Tensor) -> Tensor:
    """Values, in parts with the processes where a tensor of the same kind is."""
    if not isinstance(reference, Borrowed) or isinstance(values, Borrowed):
        return values
    return Borrowed(reference._cell.loans.made(values.detach(), reference._cell.like))


class Loans(Serving):
    """`Serving`, of the same arguments, on the first process too: what that one asks of all, and keeps."""

    def __init__(self, tensors: Sequence[Tensor], rank: int) -> None:
        super().__init__(tensors, rank)
        self._numbers = itertools.count(len(tensors))
        self._users: dict[int, int] = {}
        self._released: list[int] = []
        self._here: dict[int, weakref.ref[_Cell]] = {}  # cells with wholes, the one used last at the end
        self._room = max([ROOM, *(each.nbytes for each in tensors)])

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

    def copied(self, cell: _Cell) -> _Cell:
        """A cell of the same values, which changes by itself."""
        self._settle(cell)
        assert cell.number is not None
        self._users[cell.number] += 1
        return _Cell(self, cell.number, cell.like, None, cell.form)

    def is_cut_alike(self, left: _Cell, right: _Cell) -> bool:
        """Whether the processes hold the same entries of two cells."""
        forms = [self._layouts[cell.like].with_form(cell.form.shape, torch.bool) for cell in (left, right)]
        return forms[0] == forms[1]

    def is_in_rows(self, cell: _Cell) -> bool:
        """Whether the parts of a cell lie one below the other, or are copies."""
        return self._layouts[cell.like].with_form(cell.form.shape, cell.form.dtype).is_in_rows

    def computed(self, name: tuple[str, str, str], args: Any, kwargs: dict[str, Any], like: _Cell) -> _Cell:
        """A cell of what an operator gives, which each process computes from its parts."""
        there = list[_Cell]()  # until it is computed

        def told(operand: Tensor) -> Held | Product:
            product = None if isinstance(operand, Borrowed) else as_product(operand, like.form.shape)
            if product is not None:
                return product
            cell = operand._cell if isinstance(operand, Borrowed) else self.made(operand.detach(), like.like)
            self._settle(cell)
            assert cell.number is not None
            there.append(cell)
            return Held(cell.number)

        number, (args, kwargs) = next(self._numbers), pytree.tree_map_only(Tensor, told, (args, kwargs))
        self._order("compute", number, name, args, kwargs)
        self._compute(number, name, args, kwargs)
        self._users[number] = 1
        found = self._parts[number]
        form = torch.empty(found.shape, dtype=found.dtype, device="meta")
        return _Cell(self, number, like.like, None, form)

    def take_over(self, cell: _Cell, other: _Cell) -> None:
        """Let a cell, of which no whole is here, have the parts of another one."""
        self._forget_number(cell)
        assert other.number is not None
        self._users[other.number] += 1
        cell.number, cell.form = other.number, other.form

    def asked(self, cell: _Cell, function: Callable[[Tensor, int], Any]) -> list[Any]:
        """What a function gives for the parts of a cell."""
        self._settle(cell)
        assert cell.number is not None
        self._order("ask", cell.number, function)
        return self._answers(cell.number, function)

    def worked(self, function: Callable[..., Result], given: Any, here: Any) -> Result:
        """What a function gives here that every process calls, of the parts that it serves and of what it is given.

        Args:
            function: pickled, and so is what is `given` to it. here: what it gets besides on this process.
        """
        self._order("work", function, given)
        return function(self, given, here)

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
        own = self.agreed(layout.incoming)
        self.together(lambda: self._take(number, layout, own, values, pieces))
        self._users[number] = 1
        cell.number = number

    def _called_in(self, number: int) -> Tensor:
        """The whole of what is held in parts."""
        held = self._parts[number]
        layout = Layout.of(held)  # type: ignore[arg-type]
        if not layout.is_simple:
            self._order("gather", number)
            self.agreed(lambda: layout.outgoing(part(held)))
            found: Tensor = self.together(lambda: whole(held))
            self.counts.gathered += found.nbytes - part(held).nbytes
            is_own = found.untyped_storage().data_ptr() == part(held).untyped_storage().data_ptr()  # of a copy
            return found.clone() if is_own else found.to(self.device)
        room = layout.room()
        pieces = layout.pieces(room)
        self._order("gather", number)
        own = self.agreed(lambda: layout.outgoing(part(held)))
        self.counts.gathered += self.together(lambda: layout.collect(own, room, pieces))
        return room

    def _forget_number(self, cell: _Cell) -> None:
        cell.digest = None
        if cell.number is not None:
            self.release(cell.number)
            cell.number = None

    def _order(self, *order: Any) -> None:
        released, self._released = self._released, []
        self.together(lambda: sent_object((order, released), self.rank))
        self._drop(released)
