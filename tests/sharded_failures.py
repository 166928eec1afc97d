"""What is asked of a network in several processes of which one fails, or is lost."""

from __future__ import annotations

import errno
import os
import signal
import time
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.tensor import DTensor
from torch.nn.utils.prune import L1Unstructured

import fxprune
from fxprune import serving
from fxprune.callbacks import masks_from_states
from fxprune.checkpoints import in_parts
from fxprune.driver import finalizing
from fxprune.graph import spread_modules
from fxprune.graph import traced as traced_modules
from fxprune.graph.masks import ParameterView
from fxprune.passes import (
    FoldReparametrizations,
    InsertSpectralNorm,
    InsertWeightNorm,
    fold_reparametrizations,
    insert_parametrization,
)
from fxprune.passes.insert_mask import InsertMasks
from fxprune.prune import mirror, selection
from fxprune.prune import schedule as schedules
from fxprune.prune.repair import refitting_of_all
from fxprune.prune.slice_sums import SliceSums
from fxprune.sharding import Layout, part
from fxprune.training import continuation
from tests import sharded_networks as networks

P = fxprune.prune


def left_by_one(when: str, folder: str, lost: int | None = None) -> dict[str, str]:
    """What is raised where a process, the last, ends in the middle: of gathering parameters, or of writing parts."""
    module = networks.by_fsdp(networks.traced())
    networks.keep_nothing_whole()
    if when == "reconstruct":
        P.l1_unstructured(module, "*er.weight", 0.3)
    if dist.get_rank() == (dist.get_world_size() - 1 if lost is None else lost):
        _leave_after(3 if when in {"masks", "channels", "save"} else 20, when)
    calls: dict[str, Callable[[], Any]] = {
        "masks": lambda: P.l1_unstructured(module, "*.weight", 0.3),
        "channels": lambda: _by_taylor(module),
        "reconstruct": lambda: fxprune.reconstruct(module, networks.batches()),
        "save": lambda: fxprune.save(module, f"{folder}/network.fxp"),
        "onnx": lambda: fxprune.export.to_onnx(module.eval(), f"{folder}/network.onnx"),
        "parts": lambda: fxprune.save(module, f"{folder}/parts", parts=True),
    }
    return networks.failures({when: calls[when]}) | {"masked": str(fxprune.prune.is_pruned(module))}


def _leave_after(count: int, when: str) -> None:
    """Let this process end at a collective: the first of a save in parts after its tensors, else at the `count`-th."""
    left = [count]

    def leaving(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    if when == "parts":
        left[0] = 1
        in_parts.save_state = leaving(in_parts.save_state)
    else:
        DTensor.full_tensor = leaving(DTensor.full_tensor)  # type: ignore[method-assign]
        Layout.collect = leaving(Layout.collect)  # type: ignore[method-assign]


def _full(*given: Any, **options: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def with_a_full_disk(folder: str) -> dict[str, str]:
    """What is raised where the disk is full for one process, the last, and what is there then."""
    module = networks.by_fsdp(networks.traced())
    fxprune.save(module, f"{folder}/parts", parts=True)
    before = networks.values(module)
    P.l1_unstructured(module, "*.weight", 0.3)
    if dist.get_rank() == dist.get_world_size() - 1:
        FileSystem.create_stream = _full  # type: ignore[method-assign]
    found = networks.failures({"parts": lambda: fxprune.save(module, f"{folder}/parts", parts=True)})
    again = networks.values(fxprune.load(f"{folder}/parts"))
    is_whole = before.keys() == again.keys() and all(torch.equal(before[name], again[name]) for name in before)
    return found | {"what was there": str(is_whole), "files": str(sorted(os.listdir(folder)))}


def failing_alone(what: str, folder: str, failing: int = 0) -> dict[str, str]:
    """What is raised, and after how many seconds, where one process fails on its own while all work together."""
    module = networks.by_fsdp(networks.traced())
    networks.keep_nothing_whole()
    inputs, fails = networks.batches(), dist.get_rank() == failing
    if fails and what in _FAILING:
        _fail_after(3, *_FAILING[what])
    unpicklable: list[Any] = [(x, lambda: 0) for x in inputs] if fails else inputs
    calls: dict[str, Callable[[], Any]] = {
        "interrupted": lambda: P.channels(module, macs=0.5, importance=_interrupted),
        "no pickle": lambda: P.channels(module, macs=0.5, importance="obs", loader=unpicklable),
        "interrupted loader": lambda: P.channels(module, importance="obs", loader=_interrupted_loader(fails)),
        "file, full": lambda: fxprune.save(module, f"{folder}/network.fxp"),
        "parts, memory": lambda: fxprune.save(module, f"{folder}/parts", parts=True),
        "sums": lambda: P.channels(module, macs=0.5),
        "method": lambda: P.apply(module, "*.weight", networks.Odd()),
        "global method": lambda: P.global_unstructured(module, "*.weight", networks.Odd),
        "histogram": lambda: P.global_unstructured(module, "*.weight", L1Unstructured, amount=0.5),
    }
    start = time.perf_counter()
    try:
        calls.get(what, lambda: _by_taylor(module))()
        found = "nothing"
    except BaseException as error:
        found = f"{type(error).__name__}: {error}"
    # what was told by all of them can be told again
    again = networks.failures({"again": lambda: P.channels(module, targets="strange")})
    return again | {"raised": found, "seconds": str(time.perf_counter() - start), "masked": str(P.is_pruned(module))}


def _by_taylor(module: fxprune.TracedModule) -> Any:
    """A choice for which weights come and gradients go."""
    loader = [(x, torch.arange(4) % 6) for x in networks.batches()]
    return P.channels(module, macs=0.5, importance="taylor", loader=loader, loss=torch.nn.functional.cross_entropy)


_FAILING: dict[str, tuple[Any, str, BaseException]] = {
    "memory of the whole": (Layout, "room", MemoryError("no room")),
    "memory of what goes": (Layout, "pieces", MemoryError("no room")),
    "memory of what leaves": (Layout, "outgoing", MemoryError("no room")),
    "memory of what comes": (Layout, "incoming", MemoryError("no room")),
    "interrupted transfer": (Layout, "outgoing", KeyboardInterrupt()),
    "a defect": (Layout, "with_form", LookupError("a defect")),
    "computing a part": (serving, "called", MemoryError("no room")),
    "method": (networks.Odd, "compute_mask", MemoryError("no room")),
    "global method": (networks.Odd, "compute_mask", MemoryError("no room")),
    "sums": (SliceSums, "_entries", MemoryError("no room")),
    "histogram": (torch, "bincount", MemoryError("no room")),
    "file, full": (zipfile.ZipFile, "open", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    "parts, memory": (FileSystem, "create_stream", MemoryError("no room")),
}


def _fail_after(count: int, owner: Any, name: str, error: BaseException) -> None:
    """Let a function raise an error at its `count`-th call, or the first where it is of a file."""
    real, left = getattr(owner, name), [count if owner is Layout else 1]

    def call(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] <= 0:
            raise error
        return real(*args, **kwargs)

    setattr(owner, name, call)


# by call the function within it that fails: one that each process calls by itself, where it stands in the call
ALONE: dict[str, tuple[Any, str]] = {
    "identity": (InsertMasks, "run"),
    "l1_unstructured": (InsertMasks, "requires"),
    "ln_structured": (mirror, "find"),
    "nm_structured": (mirror, "unmasked"),
    "custom_from_mask": (mirror, "constructed"),
    "global_unstructured": (selection, "_cut_of_parts"),
    "global_unstructured, of one's own": (mirror, "_compute"),
    "keep_largest": (selection, "_counted"),
    "masks, halfway": (ParameterView, "insert_mask"),
    "masks anew, halfway": (ParameterView, "replace_mask"),
    "remove": (FoldReparametrizations, "run"),
    "remove, halfway": (fold_reparametrizations, "restore_order"),
    "a whole parameter": (Layout, "room"),
    "Schedule": (schedules, "computed"),
    "Schedule.step": (schedules, "_increment"),
    "channels": (InsertMasks, "run"),
    "reconstruct": (refitting_of_all, "mark_refitted"),
    "weight_norm": (InsertWeightNorm, "register"),
    "weight_norm, halfway": (insert_parametrization, "_hold"),
    "spectral_norm": (InsertSpectralNorm, "run"),
    "remove_weight_norm": (FoldReparametrizations, "run"),
    "finalize": (finalizing, "_shapes"),
    "optimizer_after": (continuation, "_state"),
    "load_state_dict": (traced_modules, "check_state"),
    "sensitivity": (spread_modules, "with_all_batches"),
    "to_onnx": (spread_modules, "masked"),
}
_CHANGING = {
    *(InsertMasks, ParameterView, FoldReparametrizations, fold_reparametrizations),
    *(insert_parametrization, refitting_of_all),
}
_PREPARED: dict[str, Callable[[fxprune.TracedModule], Any]] = {
    "keep_largest": lambda m: m.get_parameter("inner.weight"),
    "masks anew, halfway": lambda m: P.l1_unstructured(m, "*.weight", 0.3),
    "remove": lambda m: P.l1_unstructured(m, "inner.weight", 0.3),
    "remove, halfway": lambda m: P.l1_unstructured(m, "*er.weight", 0.3),
    "reconstruct": lambda m: P.l1_unstructured(m, "inner.weight", 0.3),
    "remove_weight_norm": lambda m: fxprune.weight_norm(m, "inner.weight"),
    "Schedule.step": lambda m: fxprune.Schedule(m, "*er.weight", L1Unstructured, 0.5),
    "load_state_dict": networks.values,
    "optimizer_after": lambda m: (fxprune.finalize(m, verify=False), torch.optim.SGD(m.parameters(), lr=0.1)),
}
_CALLS: dict[str, Callable[[fxprune.TracedModule, Any], Any]] = {
    "identity": lambda m, _: P.identity(m, "inner.weight"),
    "l1_unstructured": lambda m, _: P.l1_unstructured(m, "*.weight", 0.3),
    "ln_structured": lambda m, _: P.ln_structured(m, "*er.weight", 0.3, 2, 0),
    "nm_structured": lambda m, _: P.nm_structured(m, "inner.weight", 2, 4),
    "custom_from_mask": lambda m, _: P.custom_from_mask(m, "head.weight", torch.arange(60).view(6, 10) % 3),
    "global_unstructured": lambda m, _: P.global_unstructured(m, "*.weight", L1Unstructured, amount=0.5),
    "global_unstructured, of one's own": lambda m, _: P.global_unstructured(m, "*.weight", networks.Odd),
    "keep_largest": lambda m, kept: selection.keep_largest([kept], [None], 0.5),
    "masks, halfway": lambda m, _: P.l1_unstructured(m, "*.weight", 0.3),
    "masks anew, halfway": lambda m, _: P.l1_unstructured(m, "*.weight", 0.3),
    "remove": lambda m, _: P.remove(m, "inner.weight"),
    "remove, halfway": lambda m, _: P.remove(m, "*er.weight"),
    "a whole parameter": lambda m, _: P.l1_unstructured(m, "*.weight", 0.3),
    "Schedule": lambda m, _: fxprune.Schedule(m, "*er.weight", L1Unstructured, 0.5),
    "Schedule.step": lambda _, schedule: schedule.step(),
    "channels": lambda m, _: P.channels(m, macs=0.5),
    "reconstruct": lambda m, _: fxprune.reconstruct(m, networks.batches()),
    "weight_norm": lambda m, _: fxprune.weight_norm(m, "inner.weight"),
    "weight_norm, halfway": lambda m, _: fxprune.weight_norm(m, "inner.weight"),
    "spectral_norm": lambda m, _: fxprune.spectral_norm(m, "inner.weight"),
    "remove_weight_norm": lambda m, _: fxprune.remove_weight_norm(m, "inner.weight"),
    "finalize": lambda m, _: fxprune.finalize(m),
    "optimizer_after": lambda _, made: fxprune.optimizer_after(*made),
    "load_state_dict": lambda m, state: m.load_state_dict(state),
    "sensitivity": lambda m, _: fxprune.sensitivity(m, networks.batches()),
    "to_onnx": lambda m, _: fxprune.export.to_onnx(m, "not-written.onnx"),
}


def failing_in_each_call(failing: int) -> dict[str, tuple[str, float, set[str], bool]]:
    """What each of ALONE raises where one process fails, after how many seconds, what it changed, and that it works.

    What it changed are names of the state, whose values differ or that are there no more, or "outputs".
    """
    found = {}
    for what, (owner, name) in ALONE.items():
        module = networks.by_fsdp(networks.traced())
        prepared = _PREPARED.get(what, lambda _: None)(module)
        real, before, output = getattr(owner, name), _parts(module), module.eval()(networks.inputs()).detach()
        if dist.get_rank() == failing:
            setattr(owner, name, _failing_later(real) if "halfway" in what else _out_of_memory)
        start, told = time.perf_counter(), "nothing"
        try:
            _CALLS[what](module, prepared)
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
        seconds, after = time.perf_counter() - start, _parts(module)
        changed = {key for key in before.keys() | after.keys() if not _equal(before.get(key), after.get(key))}
        if not torch.equal(module.eval()(networks.inputs()), output):
            changed.add("outputs")
        setattr(owner, name, real)
        found[what] = told, seconds, changed, _works(module, what, prepared)
    return found


def _works(module: fxprune.TracedModule, what: str, prepared: Any) -> bool:
    """Whether the module trains afterwards, and before that the call goes through, where it changes what there is."""
    if ALONE[what][0] in _CHANGING:
        _CALLS[what](module, prepared)
    module.train()(networks.inputs()).square().mean().backward()
    return all(parameter.grad is not None for parameter in module.parameters())


def _parts(module: fxprune.TracedModule) -> dict[str, torch.Tensor]:
    return {name: part(tensor).clone() for name, tensor in module.state_dict().items()}


def _equal(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    return left is not None and right is not None and torch.equal(left, right)


def _failing_later(real: Callable[..., Any]) -> Callable[..., Any]:
    """A function that fails when it has been called, the second time where there is one before."""
    left = [2 if real.__name__ != "_hold" else 1]

    def call(*given: Any, **options: Any) -> Any:
        found = real(*given, **options)
        left[0] -= 1
        if not left[0]:
            raise MemoryError("no room")
        return found

    return call


def _out_of_memory(*given: Any, **options: Any) -> Any:
    raise MemoryError("no room")


def _interrupted(group: Any) -> Any:
    raise KeyboardInterrupt


def _interrupted_loader(fails: bool) -> Iterator[torch.Tensor]:
    yield networks.inputs()
    if fails:
        raise KeyboardInterrupt


def unequal_masks() -> dict[str, str]:
    """What is raised where a state dict has other masks on another process."""
    masked, unmasked = networks.by_fsdp(networks.traced()), networks.by_fsdp(networks.traced())
    P.l1_unstructured(masked, "head.weight", 0.3)
    state = networks.values(masked)
    state["head.weight_mask"][: dist.get_rank()] = 0
    masks_from_states(unmasked)
    return networks.failures(
        {"masked": lambda: masked.load_state_dict(state), "unmasked": lambda: unmasked.load_state_dict(state)}
    )


def asked_differently() -> dict[str, str]:
    """What is raised where the last process is asked for something else than the others, and what has changed."""
    module, method = networks.by_fsdp(networks.traced()), L1Unstructured
    is_last, rank = dist.get_rank() == dist.get_world_size() - 1, dist.get_rank()
    drawn = torch.rand(7, 10, 3, 3, generator=torch.Generator().manual_seed(rank))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.0)
    module(networks.inputs()).sum().backward()
    optimizer.step()
    if is_last:
        optimizer.state.clear()
    final, before = fxprune.finalize(module, verify=False), _parts(module)
    found = networks.failures(
        {
            "amount": lambda: P.l1_unstructured(module, "*.weight", 0.4 if is_last else 0.3),
            "names": lambda: P.l1_unstructured(module, "inner.weight" if is_last else "*.weight", 0.3),
            "calls": lambda: fxprune.finalize(module) if is_last else P.identity(module, "*.weight"),
            "global amount": lambda: P.global_unstructured(module, "*.weight", method, amount=0.1 * (1 + is_last)),
            "budget": lambda: P.channels(module, macs=0.5, **({"importance": "l1"} if is_last else {})),
            "align": lambda: fxprune.finalize(module, align=1 + is_last),
            "norm": lambda: fxprune.weight_norm(module, "inner.weight", dim=int(is_last)),
            "schedule": lambda: fxprune.Schedule(module, "*.weight", method, 0.5, scope=("local", "global")[is_last]),
            "export": lambda: fxprune.export.to_onnx(module, "not-written.onnx", verify=is_last),
            "parts": lambda: fxprune.save(module, "not-written.parts", parts=not is_last),
            "states": lambda: fxprune.optimizer_after(final, optimizer),
            "drawn scores": lambda: P.l1_unstructured(module, "inner.weight", 0.3, drawn),
            "global scores": lambda: P.global_unstructured(module, "*", method, {"inner.weight": drawn}, amount=0.3),
            "a method of one's own": lambda: P.apply(module, "*.weight", Ranked()),
            "a global one": lambda: P.global_unstructured(module, "*.weight", Ranked),
        }
    )
    after = _parts(module)
    changed = {name for name in before.keys() | after.keys() if not _equal(before.get(name), after.get(name))}
    P.l1_unstructured(module, "*.weight", 0.3)
    return found | {"changed": str(changed), "masked": str(P.is_pruned(module))}


class Ranked(networks.Odd):
    """A method of which each process makes something else."""

    def compute_mask(self, t: torch.Tensor, default_mask: torch.Tensor) -> torch.Tensor:
        return super().compute_mask(t, default_mask).roll(dist.get_rank())
