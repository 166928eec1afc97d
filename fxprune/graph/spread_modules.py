"""Traced modules whose tensors are spread over processes: what the first process does for all with the whole of one."""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import pickle
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils.data import Dataset

from fxprune import borrowing
from fxprune.borrowing import Borrowed, Loans
from fxprune.calling import spelled
from fxprune.communication import communicating, give_up, led_by_first, together
from fxprune.errors import FxpruneError, ShardingError
from fxprune.graph.masks import masked, view
from fxprune.graph.names import tensors_of
from fxprune.graph.traced import TracedModule
from fxprune.sharding import (
    check_values,
    first_rank,
    gathered_objects,
    is_sharded,
    most_spread,
    over,
    rest,
    sent,
    sent_object,
    spread,
    whole,
)
from fxprune.torch_internals import take_parameters

Result = TypeVar("Result")
Told = TypeVar("Told")
Given = ParamSpec("Given")
Part = TypeVar("Part", bound=nn.Module)


_NONE = object()  # in the place of a batch


def reference_of(traced: nn.Module) -> Tensor | None:
    """The parameter or buffer of a module that is spread over the most processes, None where none is spread."""
    rest(traced)
    return most_spread(tensors_of(traced).values())


def is_spread(traced: object) -> bool:
    """Whether a value is a traced module that is spread over processes."""
    return isinstance(traced, TracedModule) and reference_of(traced) is not None


def hollow_copy(traced: TracedModule) -> TracedModule:
    """A copy with the graphs and shapes of the module, and no values: on the device "meta"."""
    masked(traced)  # masks that are not spread yet are spread
    return _copied(traced, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))


def _on_cpu(module: TracedModule) -> TracedModule:
    """A module whose tensors are on the CPU, with what its graphs and samples say of devices, in place."""
    samples = pytree.tree_leaves((module.example_args, module.example_kwargs))
    for device in {each.device for each in samples if isinstance(each, Tensor)} - {torch.device("cpu")}:
        module.follow(device, torch.device("cpu"))
    return module


def _copied(traced: TracedModule, value_of: Callable[[Tensor], Tensor]) -> TracedModule:
    """A copy of the module without what FSDP adds to it, with other tensors."""
    memo: dict[int, Any] = {}
    for tensor in tensors_of(traced).values():
        if id(tensor) not in memo:
            value = value_of(tensor)
            memo[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    return TracedModule.__deepcopy__(traced, memo)


def lent_copy(traced: TracedModule, rank: int) -> tuple[Loans, Callable[[], TracedModule]]:
    """Make ready to lend the values of a module, which stay in parts with all; a collective.

    Returns:
        What the others serve; and for the process of this rank, what gives it the copy, and sends nothing.

    Raises:
        ShardingError: a parameter has no values; on every process.
    """
    masked(traced)
    distinct = {id(tensor): tensor for tensor in tensors_of(traced).values()}
    mesh = reference_of(traced).device_mesh  # type: ignore[union-attr]
    own_ones = {key: tensor for key, tensor in distinct.items() if is_sharded(tensor)}
    on_all(lambda: check_values(*own_ones.values()), rank)
    spread_ones = on_all(lambda: {key: over(tensor, mesh) for key, tensor in own_ones.items()}, rank)
    lent = {key: tensor for key, tensor in spread_ones.items() if tensor.nbytes >= borrowing.SMALL}
    loans = Loans([*lent.values()], rank)
    loans.module = traced
    numbers = {key: number for number, key in enumerate(lent)}
    here, small = dist.get_rank() == rank, dict[int, Tensor]()
    for key, tensor in distinct.items():
        if key not in lent:
            gathered = whole(tensor)
            if here:
                small[key] = gathered if gathered is not tensor else gathered.clone()
    return loans, lambda: _copied(
        traced, lambda tensor: small[id(tensor)] if id(tensor) in small else loans.lent(numbers[id(tensor)])
    )


def on_all(work: Callable[[], Result], rank: int) -> Result:
    """What each process makes by itself; a collective of the default group, which sends nothing but errors.

    Args:
        work: sends nothing. rank: of the process that is told of errors first.

    Raises:
        FxpruneError: what `work` raised on this process. ShardingError: it failed on another one.
    """
    found, failure = None, None
    try:
        found = work()
    except Exception as error:
        failure = error
    told = gathered_objects(None if failure is None else f"{type(failure).__name__}: {failure}", rank)
    failed = {} if told is None else {number: text for number, text in enumerate(told) if text is not None}
    first = sent_object(next(iter(failed.items()), None), rank)
    if failure is not None:
        raise failure
    if first is not None:
        raise ShardingError(f"process {first[0]} failed: {first[1]}")
    return found  # type: ignore[return-value]


def by_loans(
    traced: TracedModule, work: Callable[[TracedModule], Result], tell: Callable[[Result, Loans], Told]
) -> tuple[Told, list[Result], Loans]:
    """Let the first process do what one process does, while the values of the module stay in parts with all.

    Args:
        traced: a module that is spread over all processes of the default group.
        work: called on the first process with a copy whose large tensors are borrowed.
        tell: called there with what `work` gave; what it gives is pickled, and sent to all.

    Returns:
        What `tell` gave; on the first process alone, what `work` gave; and what is held of tensors that `tell` named.

    Raises:
        FxpruneError: on every process what was raised on the first one. ShardingError: a process is gone.
    """
    rank = first_of_all(traced)
    loans, lend = lent_copy(traced, rank)
    with led_by_first():
        if dist.get_rank() != rank:
            told, error = pickle.loads(_served(loans))
            if error is not None:
                raise loans.failure or error
            return told, [], loans
        try:
            result = work(lend())
            told = tell(result, loans)
            pickled = pickle.dumps((told, None))
        except BaseException as error:  # whatever it is, the others wait
            if loans.are_lost:
                give_up()
            else:
                loans.end(pickle.dumps((None, _plain(error))))
            raise
        loans.end(pickled)
        return told, [result], loans


def _served(loans: Loans) -> bytes:
    try:
        found: bytes = loans.serve()
    except BaseException:  # the first one, which waits for an answer, cannot be told
        give_up()
        raise
    return found


def in_whole(module: TracedModule) -> TracedModule:
    """The module on the CPU, with plain tensors in the place of those that are borrowed, in place."""

    def plain(tensor: Tensor) -> Tensor:
        if isinstance(tensor, Borrowed):
            return tensor.whole().cpu().clone()
        return tensor if tensor.device.type == "cpu" else tensor.detach().cpu()

    return _on_cpu(_replaced(module, plain))


def with_stand_ins(module: nn.Module) -> dict[str, Tensor]:
    """Put plain tensors without values in the place of those that are borrowed, in place: memory that nobody writes to.

    Returns:
        What was borrowed, by each of its names.
    """
    found: dict[str, Tensor] = {}
    found |= {name: tensor for name, tensor in tensors_of(module).items() if isinstance(tensor, Borrowed)}
    _replaced(module, lambda tensor: _without_values(tensor) if isinstance(tensor, Borrowed) else tensor)
    return found


def _without_values(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _replaced(module: Part, value_of: Callable[[Tensor], Tensor]) -> Part:
    """A module with other tensors, in place; one by one."""
    for key, tensor in {id(tensor): tensor for tensor in tensors_of(module).values()}.items():
        if (value := value_of(tensor)) is not tensor:
            value = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
            for owner in module.modules():
                held: Any
                for held in (owner._parameters, owner._buffers):
                    held.update({name: value for name, own in held.items() if own is not None and id(own) == key})
    return module


def numbers_of(tensors: Mapping[str, Tensor], loans: Loans) -> dict[str, int]:
    """Where the parts of those tensors are found that are borrowed, by name."""
    return {name: loans.number_of(tensor) for name, tensor in tensors.items() if isinstance(tensor, Borrowed)}


def failing_together(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Let a function of a module that is spread, which all processes call, end on all where it fails on one."""

    @functools.wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        given = args[0] if args else next(iter(kwargs.values()), None)
        is_shared = dist.is_available() and dist.is_initialized() and is_spread(given)
        reference = reference_of(given) if is_shared else None  # type: ignore[arg-type]
        with together(reference, spelled(function, args, kwargs) if is_shared else ""):
            return function(*args, **kwargs)

    return call


def written_by_first(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Let a function of a module and a path take modules that are spread, too: the first process runs it.

    It has plain tensors, mapped from files beside the path, which the system reads where values are asked for, and
    forgets where it needs the memory. What it returns is pickled, and sent to all.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        if not args or not is_spread(args[0]):
            return function(*args, **kwargs)
        traced: Any = args[0]

        def work(copied: TracedModule) -> Result:
            options = dict(signature.bind(*args, **kwargs).arguments)
            del options[next(iter(options))]
            beside = Path(options["path"]).parent
            with tempfile.TemporaryDirectory(prefix=".fxprune-", dir=beside if beside.is_dir() else None) as folder:
                return _called(function, _mapped(copied, Path(folder)), options)

        with together(reference_of(traced), spelled(function, args, kwargs)):
            return by_loans(traced, work, lambda found, loans: found)[0]

    return call


def _mapped(module: TracedModule, folder: Path) -> TracedModule:
    """The module on the CPU, with tensors of files in the place of those that are borrowed, in place."""

    def value_of(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, Borrowed):
            return tensor if tensor.device.type == "cpu" else tensor.detach().cpu()
        file = folder / f"{next(numbers)}"
        tensor.whole().detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tofile(file)
        flat: Tensor = torch.from_file(os.fspath(file), size=tensor.numel(), dtype=tensor.dtype)
        return flat.view(tensor.shape)

    numbers = itertools.count()
    return _on_cpu(_replaced(module, value_of))


def lent_to_first(*batches: str) -> Callable[[Callable[Given, Result]], Callable[Given, Result]]:
    """Let a function that changes no module take one that is spread: the first process runs it, on a borrowed copy.

    Args:
        batches: names of arguments that are batches, of which each process has its own.
    """

    def decorate(function: Callable[Given, Result]) -> Callable[Given, Result]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
            if not args or not is_spread(args[0]):
                return function(*args, **kwargs)
            traced: Any = args[0]
            with together(reference_of(traced), spelled(function, args, kwargs)):
                options = with_all_batches(traced, dict(signature.bind(*args, **kwargs).arguments), batches)
                work: Callable[[TracedModule], Result] = lambda copied: _called(function, copied, options)  # noqa: E731
                return by_loans(traced, work, lambda found, loans: found)[0]

        return call

    return decorate


def with_all_batches(
    traced: TracedModule, options: Mapping[str, Any], batches: Iterable[str], *, most: int | None = None,
    one_call: tuple[type, ...] = (Tensor, Mapping, tuple),
) -> dict[str, Any]:  # fmt: skip
    """The arguments of a call beside its module, with the batches of all processes on the first one; a collective.

    What goes wrong with those of one is raised by the first process when it reads them.

    Args:
        traced: the module.
        options: all arguments, the module first.
        batches: names of those that are batches.
        most: how many are taken of each process.
        one_call: types of what is one batch by itself.
    """
    rank, found = first_of_all(traced), dict(options)
    del found[next(iter(found))]
    for name in batches:
        own = found.get(name)
        try:
            found[name] = all_batches([own] if isinstance(own, one_call) else own, most, rank)
        except BaseException as error:
            if dist.get_rank() != rank:
                raise
            found[name] = _raising(error)
    return found


def _raising(error: BaseException) -> Iterable[Any]:
    raise error
    yield


def _called(function: Callable[..., Result], copied: TracedModule, options: Mapping[str, Any]) -> Result:
    return function(copied, **options)


def in_one_process(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Let a function refuse modules that are spread over processes, by its name."""

    @functools.wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        if args and is_spread(args[0]):
            raise ShardingError(
                f"{function.__name__} was given a module that is spread over processes; it is for one that one "
                "process has whole. Call it on the module of one process before it is sharded, or on what "
                "fxprune.finalize(traced, whole=True) gives on the first process."
            )
        return function(*args, **kwargs)

    return call


def first_of_all(traced: TracedModule) -> int:
    """The first process; raises ShardingError unless the module is spread over all processes."""
    reference = reference_of(traced)
    assert reference is not None
    with communicating("a plan for all processes"):
        size = dist.get_world_size()
    if (found := reference.device_mesh.size()) != size:  # type: ignore[attr-defined]
        raise ShardingError(
            f"the module is spread over {found} of {size} processes. Make a process group of these alone, or shard it "
            "over all, as on a mesh of two dimensions (copies of shards)."
        )
    return first_rank(reference)


def _plain(error: BaseException) -> Exception:
    """An error that can be sent to another process."""
    text = str(error)
    try:
        found = type(error)(text) if isinstance(error, FxpruneError) else None
    except Exception:  # its constructor takes more
        found = None
    return ShardingError(f"on the first process: {type(error).__name__}: {text}") if found is None else found


def all_batches(batches: Any, most: int | None, rank: int) -> Any:
    """The batches of all processes in turns, on the process of this rank; those that are the same everywhere once.

    Args:
        batches: of this process, None where it has none.
        most: how many of them at most.
        rank: of the process that gets them; the others get None.

    Raises:
        ShardingError: on that process, where the batches of one raise an error.
    """
    own: list[Any] = []
    device = torch.device("cpu")
    try:
        if isinstance(batches, Iterable) and not isinstance(batches, Dataset):
            there = [*itertools.islice(batches, most)]
            device = next((each.device for each in pytree.tree_leaves(there) if isinstance(each, Tensor)), device)
            own = pytree.tree_map_only(Tensor, Tensor.cpu, there)
        pickled: bytes | str = pickle.dumps(own)
    except BaseException as error:  # the caller's own; the others wait
        pickled = f"{type(error).__name__}: {error}"
        if not isinstance(error, Exception):  # such as an interruption
            gathered_objects(pickled, rank)
            raise
    told = gathered_objects(pickled, rank)
    if told is None:
        return None
    if failed := {i: each for i, each in enumerate(told) if isinstance(each, str)}:
        raise ShardingError(f"the loader of process {min(failed)} failed: {failed[min(failed)]}")
    found = [pickle.loads(each) for each in told]
    if not any(found):
        return batches
    together = []
    for row in itertools.zip_longest(*found, fillvalue=_NONE):
        there = [batch for batch in row if batch is not _NONE]
        same = len(there) == len(found) and all(_same(there[0], other) for other in there[1:])
        together += there[:1] if same else there
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), together)


def _same(left: Any, right: Any) -> bool:
    (own, shape), (others, other_shape) = pytree.tree_flatten(left), pytree.tree_flatten(right)
    return shape == other_shape and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or bool(a == b)
        for a, b in zip(own, others, strict=True)
    )


def all_alike(traced: TracedModule, alike: bool, what: str) -> None:
    """Raise ShardingError on every process unless all say that something is the same; a collective."""
    rank = first_of_all(traced)
    found = gathered_objects(alike, rank)
    if not sent_object(found is not None and all(found), rank):
        raise ShardingError(
            f"{what} is not the same on every process. Trace the same model everywhere, with the same sample inputs "
            "and options, and the same versions of torch and fxprune."
        )


def sent_masks(
    traced: TracedModule, masks: Mapping[str, Tensor] | None, names: Iterable[str], numbers: Mapping[str, int],
    loans: Loans,
) -> dict[str, Tensor]:  # fmt: skip
    """Masks that the first process has, spread as the parameters of these names, or what they are computed from.

    Args:
        traced: the module. masks: looked at on the first process alone. names: of their parameters.
        numbers: of those that processes hold parts of already.
        loans: where these are.
    """
    found = {}
    for name in names:
        own = view(traced, name)
        reference = own.original if own.original is not None else own.computed_from
        if reference is None:  # computed from parameters of other shapes
            found[name] = sent_object(None if masks is None else masks[name], first_of_all(traced))
        elif name in numbers:
            found[name] = spread(loans.part(numbers[name]), reference)
        else:
            found[name] = sent(None if masks is None else masks[name], reference)
    return found


def filled(
    hollow: TracedModule, value_of: Callable[[Tensor], Tensor], after: Callable[[TracedModule], None] | None = None
) -> TracedModule:
    """A module without values with those that a function gives for each tensor, in order; spread as it is.

    Args:
        hollow: used up.
        value_of: from a tensor on "meta" to one spread alike.
        after: called with the module before FSDP looks at its parameters: may write to these.
    """
    fresh = dict[int, Tensor]()
    for tensor in tensors_of(hollow).values():
        if id(tensor) not in fresh:
            value = value_of(tensor)
            fresh[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    for module in hollow.modules():
        held: Any
        for held in (module._parameters, module._buffers):
            held.update({name: fresh[id(tensor)] for name, tensor in held.items() if tensor is not None})
    if after is not None:
        after(hollow)
    take_parameters(hollow)
    return hollow
