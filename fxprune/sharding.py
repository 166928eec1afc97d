"""Tensors that are spread over processes (DTensor): the whole of one, sums over the parts, what is the same everywhere.

All of it is `torch.distributed.tensor`'s own. Every function that says so is a collective: all processes of the
tensor's mesh call it, in the same order. Of tensors that are no DTensor each process has its own whole one.
"""

from __future__ import annotations

import contextlib
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from fxprune.communication import communicating, mesh_of_call
from fxprune.errors import ShardingError
from fxprune.torch_internals import follow_parameters, spread_before


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is spread over processes, if only as equal copies."""
    return isinstance(tensor, DTensor)


def is_managed(module: object) -> bool:
    """Whether FSDP shards the module's parameters, and gathers them for its calls."""
    return isinstance(module, FSDPModule)


def part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; detached. Raises ShardingError where one that is spread has no values."""
    check_values(tensor)
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    own: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    if own.numel() or not tensor.numel() or not all(type(each) in (Shard, Replicate) for each in tensor.placements):
        return own
    return own.new_empty(_form_here(tensor))  # FSDP says no rows where there are no columns


def _form_here(tensor: DTensor) -> torch.Size:
    """The shape of what this process holds of a tensor, by its placements."""
    form, mesh = torch.empty(tensor.shape, device="meta"), tensor.device_mesh
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            pieces, place = form.chunk(mesh.size(axis), placement.dim), mesh.get_local_rank(axis)
            form = pieces[place] if place < len(pieces) else form.narrow(placement.dim, 0, 0)
    return form.shape


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process; detached. A collective for a tensor that is spread.

    Raises:
        ShardingError: another process is gone or late, there is no process group any more, or the tensor has no values.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    check_values(tensor)
    Layout.of(tensor).room()  # memory for it is there before others are asked to send
    with communicating("gathering a parameter"):
        gathered: Tensor = as_parts(part(tensor), tensor).full_tensor()  # type: ignore[attr-defined]
    return gathered


def check_values(*tensors: Tensor) -> None:
    """Raise ShardingError where one of tensors that are spread has no values."""
    for tensor in tensors:
        if isinstance(tensor, DTensor) and tensor.is_meta:
            raise ShardingError(
                f"a sharded parameter of shape {tuple(tensor.shape)} has no values: it is on the device meta. Load "
                "them first: module.to_empty(device=...), then a state dict, or fxprune.load(path, spread=...)."
            )


def spread(values: Tensor, reference: Tensor) -> Tensor:
    """Values that are the same on every process, spread as `reference` is; nothing is sent.

    Args:
        values: of the shape of `reference`, plain, or spread over the same mesh.
        reference: where it is plain, the values are given back as they are, those that are spread whole.
    """
    if not isinstance(reference, DTensor):
        return whole(values) if isinstance(values, DTensor) else values
    mesh = reference.device_mesh
    if isinstance(values, DTensor):
        if values.device_mesh == mesh and values.placements == reference.placements:
            return values
        if values.device_mesh.size() > mesh.size():
            widened = over(reference, values.device_mesh)
            if widened.placements == values.placements:
                return as_parts(part(values), reference)
        values = whole(values)
    return _as_cut(values, mesh, reference.placements)


def over(tensor: Tensor, mesh: DeviceMesh | None) -> Any:
    """A tensor that is spread over a part of a mesh, as copies over the rest of it; nothing is sent, memory is shared.

    So are parameters of a module of which others are tensor-parallel, and which FSDP shards over the other axes alone.

    Raises:
        ShardingError: it is spread over processes that are no part of the mesh.
    """
    if mesh is None or not isinstance(tensor, DTensor) or tensor.device_mesh == mesh:
        return tensor
    placements: list[Placement] = [Replicate()] * mesh.ndim
    for axis, placement in zip(_axes_of(tensor.device_mesh, mesh), tensor.placements, strict=True):
        placements[axis] = placement
    own = tensor.detach().to_local()  # type: ignore[attr-defined]
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


def _axes_of(part_of_it: DeviceMesh, mesh: DeviceMesh) -> tuple[int, ...]:
    """Along which axes of a mesh another one lies, which this process is in."""
    here = mesh.get_coordinate() or ()
    for axes in itertools.combinations(range(len(here)), part_of_it.ndim):
        index = tuple(slice(None) if axis in axes else place for axis, place in enumerate(here))
        if torch.equal(mesh.mesh[index], part_of_it.mesh):
            return axes
    raise ShardingError(
        f"some of the module is spread over the processes {part_of_it.mesh.tolist()}, which are no axis of the mesh "
        f"{mesh.mesh.tolist()} of the rest. Take all meshes from one: mesh = init_device_mesh(...), mesh['tensor']."
    )


def most_spread(tensors: Iterable[Tensor]) -> Tensor | None:
    """The first of the tensors that are spread over the most processes; None where none is spread."""
    return max(
        (each for each in tensors if isinstance(each, DTensor)), key=lambda each: each.device_mesh.size(), default=None
    )


def _all_of(reference: DTensor) -> DeviceMesh:
    """The mesh of those that make a call together, of which a tensor may be spread over some."""
    mesh, own = mesh_of_call(), reference.device_mesh
    return own if mesh is None or mesh.size() <= own.size() else mesh


def _as_cut(values: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    with communicating("spreading values", sends=False):
        found = distribute_tensor(values.detach(), mesh, placements, src_data_rank=None)
    own = found.detach().to_local()  # type: ignore[attr-defined]
    if own.untyped_storage().nbytes() > own.nbytes:  # a view, which would hold the memory of all
        return as_parts(own.clone(), found)
    return found


def as_parts(result: Tensor, reference: Tensor) -> Tensor:
    """What this process computed from its part of `reference`, as a part of a tensor that is spread alike."""
    if not isinstance(reference, DTensor):
        return result
    return DTensor.from_local(
        result, reference.device_mesh, reference.placements, run_check=False,
        shape=reference.shape, stride=reference.stride(),
    )  # fmt: skip


def by_parts(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """A pointwise function of tensors of one shape, computed by each process on its parts of them.

    Those that are plain are spread as the first of the others.
    """
    reference = next((tensor for tensor in tensors if isinstance(tensor, DTensor)), tensors[0])
    return as_parts(function(*(part(spread(tensor, reference)) for tensor in tensors)), reference)


class Sums:
    """Sums of what processes compute from their parts; each part counts once, however many processes hold it.

    Example:
        >>> sums = Sums()
        >>> sums.add((part(weight) == 0).sum(), weight)
        >>> sums.total()
        tensor(12)
    """

    def __init__(self) -> None:
        self._own: Tensor | None = None
        self._parts: dict[tuple[DeviceMesh, tuple[Placement, ...]], Tensor] = {}

    def add(self, own: Tensor, reference: Tensor) -> None:
        """Add what this process computed from its part of `reference`; all processes add tensors of one shape."""
        if not isinstance(reference, DTensor):
            self._own = own if self._own is None else self._own + own
            return
        key = reference.device_mesh, tuple(map(_summed, reference.placements))
        self._parts[key] = own if key not in self._parts else self._parts[key] + own

    def total(self) -> Tensor:
        """The sum of all, the same everywhere, on the CPU; a collective where parts were added."""
        found = [] if self._own is None else [self._own.cpu()]
        for (mesh, placements), own in self._parts.items():
            with communicating("adding up"):
                found.append(DTensor.from_local(own, mesh, placements, run_check=False).full_tensor().cpu())
        return torch.stack(found).sum(0) if len(found) > 1 else found[0]


def _summed(placement: Placement) -> Placement:
    if placement.is_partial():
        raise ShardingError(
            "a parameter is stored as partial sums (Partial), whose entries no process knows. Give it shards or "
            "copies: parameter.redistribute(placements=[Shard(0)])."
        )
    return Replicate() if placement.is_replicate() else Partial()


def total(own: Tensor, reference: Tensor) -> Tensor:
    """The sum over processes of what each computed from its part of `reference`; a collective where that is spread."""
    sums = Sums()
    sums.add(own, reference)
    return sums.total()


def count(tensor: Tensor, holds: Callable[[Tensor], Tensor]) -> int:
    """At how many entries of a tensor a pointwise condition holds; a collective where it is spread."""
    return int(total(holds(part(tensor)).sum(), tensor))


def equal(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one shape have the same entries everywhere; a collective where one is spread."""
    if not isinstance(left, DTensor) and not isinstance(right, DTensor):
        return torch.equal(left, right)
    return count(by_parts(torch.ne, left, right), lambda different: different) == 0


def agreed(values: Tensor, reference: Tensor, what: str) -> None:
    """Raise ShardingError on every process unless all gave the same values; a collective where `reference` is spread.

    Args:
        values: plain. reference: the tensor over whose processes they are compared.
        what: what they are, as the message begins.
    """
    if not isinstance(reference, DTensor):
        return
    mesh = _all_of(reference)
    entries = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    digest = torch.tensor([zlib.crc32(entries), values.numel()], device=mesh.device_type)
    different = (digest != first(digest, reference)).any().long()
    with communicating("comparing values"):
        found = int(DTensor.from_local(different, mesh, [Partial()] * mesh.ndim, run_check=False).full_tensor())
    if found:
        raise ShardingError(
            f"{what} is not the same on every process: {found} have another one than the first. Load or compute it in "
            "one way everywhere, or send that of one to all: torch.distributed.broadcast(tensor, 0)."
        )


def spread_state(given: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state dict whose plain tensors are spread where a module's own are; a collective where there are any.

    Raises:
        ShardingError: they are not the same on every process.
    """
    plain = [
        name
        for name, value in given.items()
        if isinstance(own.get(name), DTensor) and isinstance(value, Tensor) and not isinstance(value, DTensor)
    ]
    for name in plain:
        agreed(given[name], own[name], f"{name!r} of the state dict")
    return {**given, **{name: spread(given[name], own[name]) for name in plain}} if plain else given


def first(own: Tensor, reference: Tensor) -> Tensor:
    """What the first process gives, on all that make a call or hold a tensor; a collective where that is spread."""
    if not isinstance(reference, DTensor):
        return own
    mesh = _all_of(reference)
    with communicating("sending values"):
        return distribute_tensor(own.detach().to(mesh.device_type).clone(), mesh, [Replicate()] * mesh.ndim).to_local()


def sent(values: Tensor | None, reference: Tensor) -> Tensor:
    """Values that the first process has, spread as `reference` is; a collective of all processes.

    Args:
        values: on the first process a plain tensor; looked at there alone.
        reference: of the shape and dtype of the values; where it is plain, all processes of the default group get all.
    """
    if isinstance(reference, DTensor):
        widened = over(reference, _all_of(reference))
        mesh, rank = widened.device_mesh, first_rank(widened)
        return spread(sent_as(values, reference.shape, reference.dtype, mesh, widened.placements, rank), reference)
    own = values if dist.get_rank() == 0 and values is not None else torch.empty(reference.shape)
    with communicating("sending a tensor"):
        whole_one = own.detach().to(reference.device, reference.dtype).contiguous().clone()
        dist.broadcast(whole_one, 0)
        return whole_one


def sent_as(
    values: Tensor | None, shape: torch.Size, dtype: torch.dtype, mesh: DeviceMesh, placements: Sequence[Placement],
    rank: int,
) -> Tensor:  # fmt: skip
    """Values that the first process has, of this rank, spread over a mesh that it is the first of; a collective."""
    own = values if dist.get_rank() == rank and values is not None else torch.empty(shape, dtype=dtype)
    own = own.detach().to(mesh.device_type, dtype)
    with communicating("sending a tensor"):
        if all(type(each) in (Shard, Replicate) for each in placements):
            return distribute_tensor(own, mesh, placements, src_data_rank=0)
        copied = distribute_tensor(own.clone(), mesh, [Replicate()] * mesh.ndim).to_local()
        return _as_cut(copied, mesh, placements)  # of strided shards torch sends none


def device_of(mesh: DeviceMesh) -> torch.device:
    """The device that this process computes on for a mesh."""
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


@dataclass(frozen=True)
class Layout:
    """How a tensor is spread over all processes of the default group, and how its pieces come and go one by one.

    The first process is the first one of the mesh. What may fail on one process alone, for lack of memory, is done in
    `room`, `pieces`, `outgoing` and `incoming`, before others wait for it.

    Attributes:
        mesh, placements: as of a DTensor. shape: of the whole. dtype: of it.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: DTensor) -> Layout:
        """That of a tensor."""
        return cls(tensor.device_mesh, tuple(tensor.placements), tensor.shape, tensor.dtype)

    def with_form(self, shape: torch.Size, dtype: torch.dtype) -> Layout:
        """The same for another tensor; one of another shape is cut along its first axis."""
        cut: Placement = Shard(0) if len(shape) else Replicate()
        along_first = *[Replicate()] * (self.mesh.ndim - 1), cut
        return Layout(self.mesh, self.placements if shape == self.shape else along_first, shape, dtype)

    @property
    def is_simple(self) -> bool:
        """Whether each process holds one piece, of those that `torch.chunk` gives; others come and go as a whole."""
        cut = [each for each in self.placements if not each.is_replicate()]
        return len(cut) <= 1 and all(type(each) is Shard for each in cut)

    @property
    def is_in_rows(self) -> bool:
        """Whether there is one piece, or they lie one below the other along the first axis."""
        return self.is_simple and self._cut[1] == 0

    @property
    def first_row(self) -> int | None:
        """Where the piece of this process begins; None where it has none, or another process speaks for it."""
        start = 0
        for piece, ranks in zip(self._chunks(torch.empty(self.shape, device="meta")), self._holders(), strict=False):
            if ranks[0] == dist.get_rank():
                return start
            start += len(piece) if piece.dim() else 1
        return None

    def room(self) -> Tensor:
        """Memory for the whole."""
        return torch.empty(self.shape, dtype=self.dtype, device=device_of(self.mesh))

    def pieces(self, whole: Tensor) -> list[Tensor]:
        """The pieces of the whole, views of it where they lie in one stretch."""
        return [each.contiguous() for each in self._chunks(whole)]

    def outgoing(self, own: Tensor) -> Tensor:
        """What this process holds, as it is sent."""
        if not self.is_simple:
            self.room()  # for the whole, which comes to all
            return own
        return own.to(device_of(self.mesh)).contiguous()

    def incoming(self) -> Tensor:
        """Memory for what this process is to hold."""
        if not self.is_simple:
            return self.room()
        forms = self._chunks(torch.empty(self.shape, dtype=self.dtype, device="meta"))
        number = next(number for number, ranks in enumerate(self._holders()) if dist.get_rank() in ranks)
        form = forms[number] if number < len(forms) else forms[0].narrow(self._cut[1], 0, 0)
        return torch.empty_like(form, device=device_of(self.mesh), memory_format=torch.contiguous_format)

    def collect(self, own: Tensor, whole: Tensor | None, pieces: Sequence[Tensor]) -> int:
        """Bring the pieces to the first process; a collective.

        Args:
            own: `outgoing` of what this process holds. whole: there, `room()`. pieces: there, the pieces of that.

        Returns:
            How many bytes this process got, or gave.
        """
        rank, moved, works = dist.get_rank(), 0, []
        with communicating("gathering a parameter"):
            for number, ranks in enumerate(self._holders()):
                if whole is None and rank == ranks[0] and own.numel():
                    dist.send(own, self._first)
                    moved += own.nbytes
                elif whole is not None and number < len(pieces):
                    if rank in ranks:
                        pieces[number].copy_(own)
                    else:
                        works.append(dist.irecv(pieces[number], ranks[0]))
                        moved += pieces[number].nbytes
            for work in works:
                work.wait()  # type: ignore[union-attr]
        if whole is not None:
            for view, piece in zip(self._chunks(whole), pieces, strict=True):
                if view.data_ptr() != piece.data_ptr():
                    view.copy_(piece)
        return moved

    def deal(self, pieces: Sequence[Tensor], own: Tensor) -> tuple[Tensor, int]:
        """Bring the pieces that the first process has to those that hold them; a collective.

        Args:
            pieces: there, those of the whole. own: `incoming()`.

        Returns:
            The tensor, spread; and how many bytes this process gave, or got.
        """
        rank, moved = dist.get_rank(), 0
        count = len(self._chunks(torch.empty(self.shape, device="meta")))
        with communicating("sending a tensor"):
            for number, ranks in enumerate(self._holders()[:count]):
                for other in ranks:
                    if rank == self._first:
                        if other == rank:
                            own.copy_(pieces[number])
                        else:
                            dist.send(pieces[number], other)
                            moved += pieces[number].nbytes
                    elif other == rank:
                        dist.recv(own, self._first)
                        moved += own.nbytes
        stride = torch.empty(self.shape, device="meta").stride()
        found = DTensor.from_local(own, self.mesh, self.placements, run_check=False, shape=self.shape, stride=stride)
        return found, moved

    @property
    def _first(self) -> int:
        return int(self.mesh.mesh.flatten()[0])

    @property
    def _cut(self) -> tuple[int, int]:
        """The axis of the mesh and that of the tensor; (-1, 0) where there are copies alone."""
        return next(((i, each.dim) for i, each in enumerate(self.placements) if isinstance(each, Shard)), (-1, 0))

    def _chunks(self, whole: Tensor) -> list[Tensor]:
        axis, dim = self._cut
        return [whole] if axis < 0 else [*whole.chunk(self.mesh.size(axis), dim)]

    def _holders(self) -> list[list[int]]:
        """By piece the processes that hold it."""
        axis, ranks = self._cut[0], self.mesh.mesh
        return (
            [ranks.flatten().tolist()] if axis < 0 else ranks.movedim(axis, 0).reshape(ranks.shape[axis], -1).tolist()
        )


def first_rank(reference: Tensor) -> int:
    """The rank of the first process of a tensor's mesh; 0 for one that is plain."""
    return int(reference.device_mesh.mesh.flatten()[0]) if isinstance(reference, DTensor) else 0


def gathered_objects(own: Any, rank: int) -> list[Any] | None:
    """What every process gives, on the one of this rank; None elsewhere. Pickled; a collective of the default group."""
    is_there = dist.get_rank() == rank
    found: list[Any] | None = [None] * dist.get_world_size() if is_there else None
    with communicating("gathering what each process has"):
        dist.gather_object(own, found, dst=rank)
    return found


def failed_somewhere(failure: BaseException | None, device: torch.device, rank: int) -> str | None:
    """What failed on one process, told to that of this rank, to others only that something did; a collective.

    Args:
        failure: on this process. device: that this process computes on.

    Returns:
        None where nothing failed.
    """
    failed = torch.tensor([failure is not None], dtype=torch.int32, device=device)
    with communicating("making ready to send"):
        dist.all_reduce(failed)
    if not failed.item():
        return None
    told = gathered_objects(None if failure is None else f"{type(failure).__name__}: {failure}", rank)
    return next((f"process {number} failed: {text}" for number, text in enumerate(told or []) if text), "")


def sent_object(own: Any, rank: int) -> Any:
    """What the process of this rank gives, everywhere. Pickled; a collective of the default group."""
    held = [own]
    with communicating("waiting for the first process"):
        dist.broadcast_object_list(held, src=rank)
    return held[0]


@contextlib.contextmanager
def same_draws(reference: Tensor | None) -> Iterator[None]:
    """Draw on every process what the first one draws; a collective where `reference` is spread.

    The generators of the others go on as if nothing was drawn, unless they were in the same state.
    """
    if not isinstance(reference, DTensor):
        yield
        return
    device = reference.device_mesh.device_type
    kinds = [torch.random] if device == "cpu" else [torch.random, torch.get_device_module(device)]
    before = [kind.get_rng_state() for kind in kinds]
    shared = [first(state, reference).cpu() for state in before]
    for kind, state in zip(kinds, shared, strict=True):
        kind.set_rng_state(state)
    try:
        yield
    finally:
        for kind, own, state in zip(kinds, before, shared, strict=True):
            if not torch.equal(own, state):
                kind.set_rng_state(own)


def rest(module: object) -> None:
    """Let FSDP hold its parameters as shards again, which it keeps gathered between a forward and a backward."""
    if isinstance(module, FSDPModule):
        module.reshard()


@contextlib.contextmanager
def followed(module: torch.nn.Module) -> Iterator[None]:
    """Within, parameters may get other names or others take their place: FSDP is told, and shards new ones.

    Those that take the place of such as were spread by hand are spread so, too.
    """
    rest(module)
    before, given = list(module.parameters()), spread_by_hand(module)
    yield
    if not given and not is_managed(module):
        return
    with communicating("sharding new parameters"):
        _spread_new(module, before, given)
        there = set(map(id, module.parameters()))
        if any(id(own) not in there and not isinstance(own, DTensor) for own in before):  # that FSDP was to leave alone
            before += [own for own in module.parameters() if not isinstance(own, DTensor)]
        if is_managed(module):
            follow_parameters(module, before)


def spread_by_hand(module: torch.nn.Module) -> list[tuple[torch.nn.Parameter, DeviceMesh, Sequence[Placement]]]:
    """Parameters that were spread before FSDP shards them, or where it does not; and how."""
    if is_managed(module):
        return [(own, spec.mesh, spec.placements) for own, spec in spread_before(module)]
    spread_ones = [(own, own) for own in module.parameters() if isinstance(own, DTensor)]
    return [(own, tensor.device_mesh, tensor.placements) for own, tensor in spread_ones]


def _spread_new(
    module: torch.nn.Module, before: Sequence[Tensor],
    given: Sequence[tuple[torch.nn.Parameter, DeviceMesh, Sequence[Placement]]],
) -> None:  # fmt: skip
    """Spread new parameters as those of their shape that are gone, where these were spread by hand; else as copies."""
    there, known = set(map(id, module.parameters())), set(map(id, before))
    gone = [(own.shape, mesh, placements) for own, mesh, placements in given if id(own) not in there]
    made: dict[int, torch.nn.Parameter] = {}
    for owner in module.modules() if gone else ():
        for name, own in owner._parameters.items():
            if own is None or id(own) in known or isinstance(own, DTensor):
                continue
            if id(own) not in made:
                shape, mesh, placements = next((each for each in gone if each[0] == own.shape), gone[0])
                ways = placements if shape == own.shape else [Replicate()] * mesh.ndim
                value = distribute_tensor(own.detach(), mesh, ways, src_data_rank=None)
                made[id(own)] = torch.nn.Parameter(value, own.requires_grad)
            owner._parameters[name] = made[id(own)]
