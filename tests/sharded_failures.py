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
from fxprune.prune.slice_sums import SliceSums
from fxprune.sharding import Layout
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
        "method": lambda: P.apply(module, "*.weight", Failing() if fails else networks.Odd()),
        "global method": lambda: P.global_unstructured(module, "*.weight", Failing if fails else networks.Odd),
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


class Failing(networks.Odd):
    """A method that fails on the process that has it."""

    def compute_mask(self, t: torch.Tensor, default_mask: torch.Tensor) -> torch.Tensor:
        raise MemoryError("no room")


_FAILING: dict[str, tuple[Any, str, BaseException]] = {
    "memory of the whole": (Layout, "room", MemoryError("no room")),
    "memory of what goes": (Layout, "pieces", MemoryError("no room")),
    "memory of what leaves": (Layout, "outgoing", MemoryError("no room")),
    "memory of what comes": (Layout, "incoming", MemoryError("no room")),
    "interrupted transfer": (Layout, "outgoing", KeyboardInterrupt()),
    "a defect": (Layout, "with_form", LookupError("a defect")),
    "computing a part": (serving, "called", MemoryError("no room")),
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
