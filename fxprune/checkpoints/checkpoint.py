"""Checkpoints: one file with every tensor, the plan and the graphs, written whole, read without unpickling objects."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from fxprune.calling import named_arguments
from fxprune.capture.archives import is_program, read_members, read_program
from fxprune.capture.caches import register_library
from fxprune.capture.programs import from_program
from fxprune.checkpoints.describing import described
from fxprune.checkpoints.foreign_files import refuse_strangers
from fxprune.checkpoints.header import HEADER, TENSORS, program_member
from fxprune.checkpoints.in_parts import MODULE, load_in_parts, save_in_parts
from fxprune.checkpoints.reading import CPU, read_checkpoint
from fxprune.checkpoints.refitting import refitted
from fxprune.checkpoints.restoring import restored
from fxprune.checkpoints.stored_graphs import written_graph
from fxprune.checkpoints.streamed_tensors import StreamedTensors
from fxprune.errors import ArgumentError, ArgumentTypeError, ArtifactError, FxpruneError, ShardingError, SuffixError
from fxprune.files import atomic
from fxprune.graph.requirements import require_flag
from fxprune.graph.spread_modules import failing_together, is_spread, lent_to_first
from fxprune.graph.traced import TracedModule
from fxprune.progress import shown

# what save does not write, and what does
_OTHER_FORMATS = {
    ".onnx": "fxprune.export.to_onnx",
    ".pt2": "fxprune.export.to_program",
    ".safetensors": "safetensors.torch.save_model",
}


@named_arguments
@shown("save")
@failing_together
def save(traced: TracedModule, path: str | os.PathLike[str], *, programs: bool = True, parts: bool = False) -> None:
    """Write a traced or finalized module to one file, whole or not at all; `load` restores it.

    The file is an uncompressed zip archive: `fxprune.json` (names, order, masks and norms, plan, training mode,
    digests), `tensors.safetensors` (parameters, buffers, sample inputs), and for each mode a `torch.export` program
    without weights. An optimizer's state, schedulers and random generators are torch's own to save, beside it.

    Args:
        traced: what `trace`, `finalize` or `load` returned; unchanged.
        path: the file to write; any name but that of another format (.onnx, .pt2, .safetensors).
        programs: whether to store the graphs. Without, the file is written faster, and `load` needs the model.
        parts: for a module that is spread over processes: whether each writes what it holds, to a folder of this name
            (`torch.distributed.checkpoint`, safetensors). Else the first process gathers the module, and writes a file.
            Of both it is the first one's path that counts.

    Raises:
        ArgumentTypeError: `traced` is no traced module.
        ArtifactError: something in it has no stored form; names it.
        ExportError: the path cannot be written. What stood there before is unchanged.
        SuffixError: the name ends as that of another format.

    Example:
        >>> fxprune.save(traced, "model.fxp")
        >>> traced = fxprune.load("model.fxp")
    """
    if not isinstance(traced, TracedModule):
        swapped = isinstance(traced, str | os.PathLike)
        cure = "The module comes first, then the path." if swapped else "Call fxprune.trace first."
        raise ArgumentTypeError(f"save takes a traced module, got {type(traced).__name__}. {cure}")
    traced.check_tensors()
    traced.check_values()
    if not isinstance(path, str | os.PathLike):
        raise ArgumentTypeError(f"save takes the path of a file, got {type(path).__name__}.")
    if (suffix := Path(path).suffix) in _OTHER_FORMATS:
        raise SuffixError(
            f"'{path}' was to be written by save, whose files are none of the format that {suffix} says. Use another "
            f"ending, such as .fxp, or write that format: {_OTHER_FORMATS[suffix]}."
        )
    require_flag("parts", parts)
    if not parts:
        _save_whole(traced, path, programs)
    elif is_spread(traced) and programs:
        save_in_parts(traced, path, lambda hollow, file: _save_whole(hollow, file, True))
    else:
        raise ArgumentError(
            "parts=True is for modules that are spread over processes, and stores their graphs. Leave it out."
        )


@lent_to_first()
def _save_whole(traced: TracedModule, path: str | os.PathLike[str], programs: bool) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates what it calls itself
            header, tensors, graphs = _members(traced, programs)
    except (MemoryError, ShardingError):
        raise
    except Exception as error:  # torch's writers have errors that derive from nothing narrower
        raise ArtifactError(
            f"the module cannot be stored: {type(error).__name__}: {str(error).partition(chr(10))[0]} Where a graph is "
            "the reason, programs=False stores everything else."
        ) from error
    with atomic(path) as name, zipfile.ZipFile(name, "w") as archive:
        archive.writestr(_entry(HEADER), header)
        info = _entry(TENSORS)
        info.file_size = tensors.size
        with archive.open(info, "w") as member:
            for part in tensors.parts():
                member.write(part)
                del part  # before the next one comes
        for name_inside, content in graphs.items():
            archive.writestr(_entry(name_inside), content)


def _entry(name: str) -> zipfile.ZipInfo:
    """A member of the archive without a date: equal modules give equal files."""
    return zipfile.ZipInfo(name)


def _members(traced: TracedModule, programs: bool) -> tuple[bytes, StreamedTensors, dict[str, bytes]]:
    """What a file holds, in order: the header, the tensors, and the graphs by the names of their members."""
    header, stored = described(traced)
    tensors = StreamedTensors.of(stored)
    graphs = {program_member(mode): written_graph(traced, mode) for mode in (traced.modes if programs else ())}
    digests = {TENSORS: tensors.sha256()}
    digests |= {name: hashlib.sha256(content).hexdigest() for name, content in graphs.items()}
    return dataclasses.replace(header, sha256=digests).to_json().encode(), tensors, graphs


@named_arguments
@shown("load")
def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    spread: Callable[[TracedModule], Any] | None = None,
) -> TracedModule:
    """Restore what `save` wrote: graphs, masks, norms, plan, training mode, every tensor; or an exported `.pt2`.

    No objects are unpickled and no code of the file runs: archives that would make torch do so are refused. The result
    is on the CPU, or on the device of `model`, and shares nothing with it.

    Args:
        path: a file of `save`, or a `.pt2` of `fxprune.export.to_program` or `torch.export.save` (its eval graph).
        model: None restores the graphs from the file, without the model's code. Else the dense model, which is traced
            with the stored sample inputs, or a `TracedModule` of it: the plan is carried out, masks and norms are
            inserted, then the tensors are loaded. It is left as it is.
        spread: of a folder of `save(..., parts=True)`: shards the module, in place, before it has values: each process
            then reads its part, however many wrote it. `torch.distributed.fsdp.fully_shard`, or a function that calls
            it. None reads the whole, in this process.

    Returns:
        A new `TracedModule`.

    Raises:
        ArtifactError: the file is missing, damaged, of another format (ONNX, TorchScript or weights alone, and says
            which), of a later version, could run code, or belongs to another model (missing, unexpected and differing
            names are listed).
        ArgumentTypeError: `path` is no path, or `model` no module.
        ArgumentError: the file needs a model, or must not get one.
        CaptureError: `model` cannot be traced.

    Example:
        >>> fxprune.save(traced, "model.fxp")
        >>> again = fxprune.load("model.fxp", model)  # for the same model, dense
    """
    if not isinstance(path, str | os.PathLike):
        cure = "The path comes first, then the model." if isinstance(model, str | os.PathLike) else "Give the path."
        raise ArgumentTypeError(f"load takes the path of a file, got {type(path).__name__}. {cure}")
    if model is not None and not isinstance(model, nn.Module):
        cure = " Give an instance of the class." if isinstance(model, type) else ""
        raise ArgumentTypeError(f"load takes an nn.Module to load into, got {type(model).__name__}.{cure}")
    try:
        if Path(path).is_dir() or spread is not None:
            return _loaded_in_parts(Path(path), model, spread)
        return _loaded_alone(path) if model is None else _loaded_into(path, model)
    except FxpruneError as error:
        error.add_note(f"while loading '{path}'")
        raise


def _loaded_alone(path: str | os.PathLike[str]) -> TracedModule:
    with _damage_named(path):
        refuse_strangers(path)
        members = read_members(path)
        if is_program(members):
            return from_program(read_program(path))
        _know_classes(members)
        checkpoint = read_checkpoint(members)
        if not checkpoint.programs:
            raise ArgumentError(f"'{path}' was saved with programs=False: give load the model, too.")
        return restored(checkpoint)


def _loaded_in_parts(path: Path, model: nn.Module | None, spread: Callable[[TracedModule], Any] | None) -> TracedModule:
    if model is not None or not callable(spread or load):
        raise ArgumentError("a checkpoint in parts is restored without the model, and spread is a function.")

    def read_module(file: Path) -> TracedModule:
        if not file.is_file():
            raise ArtifactError(
                f"'{path}' was to be loaded (Is a directory), and is no folder that save(..., parts=True) finished: "
                f"{MODULE} is not in it. A file of save is loaded whole: load(path), then fully_shard."
            )
        return _loaded_alone(file)

    return load_in_parts(path, read_module, spread)


def _loaded_into(path: str | os.PathLike[str], model: nn.Module) -> TracedModule:
    device = next((parameter.device for parameter in model.parameters()), CPU)
    with _damage_named(path):
        refuse_strangers(path)
        members = read_members(path)
        if is_program(members):
            raise ArgumentError(f"'{path}' is a program, which is restored without a model: leave it out.")
        _know_classes(members)
        checkpoint = read_checkpoint(members, device)
    return refitted(checkpoint, model)


def _know_classes(members: dict[str, bytes]) -> None:
    """Make classes of the transformers library known where the file names any."""
    if any(b"transformers." in content for name, content in members.items() if name != TENSORS):
        register_library()


@contextlib.contextmanager
def _damage_named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let what the content of a file makes torch, zipfile and json raise name the file, and what to do.

    For reading alone: inside a model's code such an error would be the model's.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates what it calls itself
            yield
    except (FxpruneError, MemoryError):
        raise
    except OSError as error:
        raise ArtifactError(f"'{path}' was to be loaded and cannot be read: {error}.") from error
    except Exception as error:  # torch's readers have errors that derive from nothing narrower
        raise ArtifactError(
            f"'{path}' cannot be restored: {type(error).__name__}: {error}. A file that is truncated or altered must "
            "be written again; classes of its inputs and outputs must be imported first (import transformers for its "
            "own), and dataclasses registered with torch.export.register_dataclass."
        ) from error
