"""Checkpoints in parts: a folder into which every process writes what it holds, read by any number of processes.

The tensors are written and read by `torch.distributed.checkpoint` in the layout of Hugging Face, safetensors files that
hold parts; `module.fxp` has all else: graphs, names, plan, sizes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from fxprune.communication import communicating
from fxprune.errors import ArtifactError, ExportError, FxpruneError, ShardingError
from fxprune.files import synchronize
from fxprune.graph.masks import masked
from fxprune.graph.names import tensors_of
from fxprune.graph.spread_modules import filled, first_of_all, hollow_copy, on_all
from fxprune.graph.traced import TracedModule
from fxprune.sharding import gathered_objects, sent_object

MODULE = "module.fxp"
FILE_BYTES = 2**25  # of tensors that a process writes to one file, which torch puts together in memory


def save_in_parts(
    traced: TracedModule, path: str | os.PathLike[str], write: Callable[[TracedModule, Path], None]
) -> None:
    """Write a module that is spread over processes to a folder, whole or not at all; a collective.

    Args:
        traced: the module.
        path: the folder; one of an earlier checkpoint is replaced.
        write: from a module without values and a path, writes all else.

    Raises:
        ExportError: a process cannot write; on every process. ShardingError: a process is gone. What stood there before
            is unchanged.
    """
    target, rank = Path(os.path.realpath(path)), first_of_all(traced)
    hollow = hollow_copy(traced)
    folder: Path | None = None
    try:
        folder = _together(lambda: _new_folder(target), rank, path)
        _together(lambda: _write(folder, traced), rank, path, everywhere=True)
        _together(lambda: write(hollow, folder / MODULE), rank, path)
        _together(lambda: _put(folder, target), rank, path)
    finally:
        if folder is not None and dist.get_rank() == rank:
            shutil.rmtree(folder, ignore_errors=True)


def _new_folder(target: Path) -> Path:
    if target.exists() and not (target / MODULE).is_file():
        raise ExportError(f"'{target}' is there already, and no checkpoint in parts. Give the name of a new folder.")
    return Path(tempfile.mkdtemp(prefix=".fxprune-", dir=target.parent))


def _write(folder: Path, traced: TracedModule) -> None:
    with _named_errors("written"):
        tensors = _by_first_names(traced)
        files = _files(tensors, FILE_BYTES * dist.get_world_size())
        writer = HuggingFaceStorageWriter(os.fspath(folder), files, save_distributed=True)
        save_state(tensors, storage_writer=writer)


def _files(tensors: Mapping[str, Tensor], most: int) -> dict[str, int]:
    """By name the number of the file that a tensor goes to, from 1 on; one of more bytes has a file of its own."""
    found, number, held = dict[str, int](), 1, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.itemsize
        if held and held + size > most:
            number, held = number + 1, 0
        found[name], held = number, held + size
    return found


def _put(folder: Path, target: Path) -> None:
    """Give a folder its name; an earlier one of that name goes when it is there."""
    for part in folder.iterdir():
        synchronize(part)
    if target.exists():
        earlier = Path(tempfile.mkdtemp(prefix=".fxprune-", dir=target.parent)) / target.name
        os.replace(target, earlier)
        os.replace(folder, target)
        shutil.rmtree(earlier.parent, ignore_errors=True)
    else:
        os.replace(folder, target)
    synchronize(target.parent)


def _together(work: Callable[[], Any], rank: int, path: Any, *, everywhere: bool = False) -> Any:
    """What the first process gets from `work`; raises on every process what was raised on any that worked."""
    found, failure, own = None, None, None
    if everywhere or dist.get_rank() == rank:
        try:
            found = work()
        except ShardingError:  # the others cannot be told
            raise
        except BaseException as error:  # whatever it is, the others wait
            own = None if isinstance(error, FxpruneError | OSError) else error
            text = f"{type(error).__name__}: {error}" if own else str(error)
            failure = f"'{path}' could not be written by process {dist.get_rank()}: {text}"
    failures = gathered_objects(failure, rank)
    told = next((text for text in failures if text), None) if failures is not None else None
    found, told = sent_object((found, told), rank)
    if own is not None:
        raise own
    if told is not None:
        raise ExportError(f"{told} What stood there before is unchanged.")
    return found


def _by_first_names(traced: TracedModule) -> dict[str, Tensor]:
    """Every parameter and buffer by the first of its names."""
    names: dict[int, str] = {}
    return {
        name: tensor.detach()
        for name, tensor in tensors_of(traced).items()
        if names.setdefault(id(tensor), name) == name
    }


@contextlib.contextmanager
def _named_errors(what: str) -> Iterator[None]:
    with communicating(f"a checkpoint that is {what}") if dist.is_initialized() else contextlib.nullcontext():
        try:
            yield
        except (ValueError, KeyError, RuntimeError) as error:
            if dist.is_initialized():
                raise
            raise ArtifactError(f"the checkpoint cannot be {what}: {type(error).__name__}: {error}.") from error
        except CheckpointException as error:  # no Exception
            causes = "; ".join(f"process {i}: {each[0]}" for i, each in sorted(error.failures.items()))
            if any(isinstance(each[0], OSError) for each in error.failures.values()):
                raise ExportError(f"{causes}.") from error
            raise ArtifactError(f"the checkpoint cannot be {what}: {causes}.") from error


def load_in_parts(
    path: Path, read_module: Callable[[Path], TracedModule], spread: Callable[[TracedModule], Any] | None
) -> TracedModule:
    """Fill a module without values from the folder that it was saved to; a collective where it is spread.

    Args:
        path: the folder.
        read_module: from the path of `module.fxp` to the module without values that it holds.
        spread: shards the module, in place, as `torch.distributed.fsdp.fully_shard`; None leaves it whole, on the CPU.

    Raises:
        ArtifactError: the folder cannot be read. ShardingError: that is so on another process, or each has a folder of
            its own of this name, and they differ.
    """
    if spread is None:
        hollow = read_module(path / MODULE)
    else:
        hollow, contents = on_all(lambda: (read_module(path / MODULE), _contents(path)), 0)
        alike = gathered_objects(contents, 0)
        if not sent_object(alike is not None and all(each == alike[0] for each in alike), 0):
            raise ShardingError(
                f"the checkpoint '{path}' is not the same on every process: there are others under this name on other "
                "machines. Copy one of them, whole, to all of them, or load from a folder that all of them see."
            )
        spread(hollow)
        masked(hollow)  # which are spread as their parameters

    def read(empty: TracedModule) -> None:
        with _named_errors("read"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # in one process that is meant
            load_state(
                _by_first_names(empty), storage_reader=HuggingFaceStorageReader(os.fspath(path)),
                no_dist=spread is None,
            )  # fmt: skip

    return filled(hollow, lambda tensor: torch.empty_like(tensor, device=_device(hollow)), read)


def _contents(path: Path) -> tuple[int, dict[str, int]]:
    """What tells checkpoints apart: a checksum of `module.fxp`, and the sizes of the files."""
    try:
        sizes = {each.name: each.stat().st_size for each in sorted(path.iterdir())}
        return zlib.crc32((path / MODULE).read_bytes()), sizes
    except OSError as error:
        raise ArtifactError(f"'{path}' was to be loaded: {error}.") from error


def _device(module: nn.Module) -> str:
    meshes = (getattr(tensor, "device_mesh", None) for tensor in tensors_of(module).values())
    mesh = next((each for each in meshes if each is not None), None)
    return "cpu" if mesh is None else str(mesh.device_type)
