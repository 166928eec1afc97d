"""Calls that several processes make together: what fails on one of them ends the call on all, under a name.

Before each collective of such a call, and at its end, the processes tell each other whether one has failed since the
last one, and what they are at: a maximum over four integers. So whatever a process does by itself between may raise.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial

from fxprune.errors import ShardingError
from fxprune.torch_internals import decompositions_set_aside

_LOST = (
    "Look at the other processes' errors first: one of them has ended, raised, waits for something else, or is slower "
    "than the time-out of the process group. Start all of them again, from the last checkpoint that is whole."
)
_AT_THE_END = "ending together"
_TOLD = 1000  # bytes of what is told of an error


@dataclass
class _Call:
    """A call that all processes of a mesh make.

    Attributes:
        is_over: whether nothing can be told any more, since all know of an error, or one is lost.
        is_led: whether the first process leads now, and tells errors itself.
        told: of another process's error.
    """

    mesh: DeviceMesh
    is_over: bool = False
    is_led: bool = False
    told: str = ""


_CALL: ContextVar[_Call | None] = ContextVar("_CALL", default=None)


@contextlib.contextmanager
def together(reference: Tensor | None, asked: str = "") -> Iterator[None]:
    """Within, processes do alike, and what fails on one ends it on all; a collective where `reference` is spread.

    What is together already, goes on so: errors are told at the end of the outermost.

    Args:
        reference: a tensor over whose processes it is done; None or a plain one: here alone.
        asked: of the processes, which is to be the same for all; empty where that is not compared.

    Raises:
        BaseException: what was raised on this process. ShardingError: it failed on another one, or others do something
            else.
    """
    if not isinstance(reference, DTensor) or not dist.is_initialized() or _CALL.get() is not None:
        yield
        return
    call = _Call(reference.device_mesh)
    token = _CALL.set(call)
    try:
        if asked:
            _check(call, asked)
        yield
        _check(call, _AT_THE_END)
    except BaseException as error:  # whatever it is, the others wait
        if not call.is_over:
            with contextlib.suppress(ShardingError):  # what this process raises says more
                _tell(call, error, _AT_THE_END)
        raise
    finally:
        _CALL.reset(token)


def mesh_of_call() -> DeviceMesh | None:
    """The mesh of the processes that make the present call together; None outside of `together`."""
    return None if (call := _CALL.get()) is None else call.mesh


@contextlib.contextmanager
def led_by_first() -> Iterator[None]:
    """Within, the first process tells the others what to do, and of errors; the call goes on together afterwards."""
    call = _CALL.get()
    if call is None:
        yield
        return
    call.is_led = True
    try:
        yield
    finally:
        call.is_led = False


def agree(what: str = "going on together") -> None:
    """Go on, to what is named, only where no other process has failed by now; a collective within `together`.

    Raises:
        ShardingError: another one has.
    """
    if (call := _CALL.get()) is not None and not call.is_led:
        _check(call, what)


def give_up() -> None:
    """Tell the others nothing more: one is lost, or waits for something else."""
    if (call := _CALL.get()) is not None:
        call.is_over = True


@contextlib.contextmanager
def communicating(what: str, *, sends: bool = True) -> Iterator[None]:
    """Name what fails between processes: raises ShardingError in its place, and where another one failed before.

    Args:
        what: as the message begins. sends: False where every process does it by itself.
    """
    if not dist.is_initialized():
        raise ShardingError(
            f"{what} of a sharded module needs the process group, and there is none: it was not made in this process, "
            "or destroyed. Call torch.distributed.init_process_group before, and destroy_process_group at the end."
        )
    if sends:
        agree(what)
    with _named(what):
        yield


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        with decompositions_set_aside():
            yield
    except ShardingError:
        raise
    except (RuntimeError, ValueError, KeyError, AssertionError) as error:
        give_up()
        text = str(error).partition("\n")[0].rstrip(".")
        raise ShardingError(
            f"{what}: the processes could not go on together: {type(error).__name__}: {text}. {_LOST}"
        ) from error
    except BaseException:  # others are in the midst of it
        give_up()
        raise


def _said_by(rank: int, text: str, mesh: DeviceMesh) -> str:
    """The beginning of what one process says, on all; a collective."""
    own = torch.zeros(_TOLD, dtype=torch.int64)
    if dist.get_rank() == rank:
        said = text.encode()[:_TOLD]
        own[: len(said)] = torch.tensor([*said])
    told = _over(own.to(mesh.device_type), mesh, Partial()).tolist()
    return bytes(filter(None, told)).decode(errors="replace")


def _check(call: _Call, what: str) -> None:
    """Raise ShardingError where another process has failed; a collective."""
    if not call.is_over:
        _tell(call, None, what)
    if call.told:
        raise ShardingError(call.told)


def _tell(call: _Call, failure: BaseException | None, what: str) -> None:
    """Tell the others whether this process has failed, and hear of them, and whether all do the same; a collective."""
    mesh, rank, digest = call.mesh, dist.get_rank(), zlib.crc32(what.encode())

    def largest(*own: int) -> list[int]:
        found: list[int] = _over(torch.tensor(own, device=mesh.device_type), mesh, Partial("max")).tolist()
        return found

    with _named(what):
        number, least, most, first = largest(0 if failure is None else rank + 1, -digest, digest, -rank)
        if not number and -least == most:
            return
        call.is_over = True
        if number:
            told = _said_by(number - 1, f"{type(failure).__name__}: {failure}", mesh)
            call.told = f"process {number - 1} failed: {told}" if failure is None else ""
            return
        (expected,) = largest(digest if rank == -first else -1)
        (other,) = largest(-rank if digest != expected else -dist.get_world_size())
        told, others = _said_by(-first, what, mesh), _said_by(-other, what, mesh)
    call.told = (
        f"the processes do different things: process {-first} is at {told}, process {-other} at {others}. "
        "Let all make the same calls, in the same order, with the same options and as many of everything."
    )


def _over(own: Tensor, mesh: DeviceMesh, kind: Partial) -> Tensor:
    """The maximum, or the sum, over the processes of a mesh."""
    found: Tensor = DTensor.from_local(own, mesh, [kind] * mesh.ndim, run_check=False).full_tensor()
    return found
