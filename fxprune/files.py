"""Writing files whole: under a private name first, renamed when complete."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fxprune.errors import ArgumentTypeError, ExportError, SuffixError

_REASONS = {
    errno.ENOSPC: "the disk is full; free space there, or write elsewhere",
    errno.EDQUOT: "the disk quota is used up; free space there, or write elsewhere",
    errno.EROFS: "the file system is read-only; write elsewhere",
    errno.EACCES: "the folder is read-only for this user; change its permissions, or write elsewhere",
    errno.EPERM: "the folder is read-only for this user; change its permissions, or write elsewhere",
    errno.EFBIG: "the file would be larger than the limit set for this process or file system",
}


def check_suffix(path: str | os.PathLike[str], *suffixes: str, what: str, cure: str = "") -> None:
    """Refuse the name of a file that does not end as its format's do; what is no path passes.

    Args:
        path: the name.
        suffixes: the endings that it may have.
        what: was to be done with it, as in "written".
        cure: what else to do.

    Raises:
        SuffixError: it ends otherwise.

    Example:
        >>> check_suffix("model.onnx", ".onnx", what="written")
    """
    if isinstance(path, str | os.PathLike) and Path(path).suffix not in suffixes:
        wanted = " or ".join([", ".join(suffixes[:-1]), suffixes[-1]] if len(suffixes) > 1 else suffixes)
        found = ", but it is a folder" if Path(path).is_dir() else ""
        told = f"'{path}' was to be {what}{found}; the name must end in {wanted}, by which the format is known. {cure}"
        raise SuffixError(told.rstrip())


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a name to write to, in a private folder beside `path`; move the result to `path` when the block ends.

    A reader, a second writer or a killed process leaves or sees the whole old file or the whole new one. When the
    block raises, nothing of it stays. Files that the block puts beside the given name (external data) are moved
    first; they need names that are not taken, since two files cannot be replaced at once.

    Args:
        path: the file to write. A link is followed; an existing file keeps its permission bits.

    Raises:
        ExportError: `path` is a folder or a device, its folder is missing or read-only, or the disk is full.

    Example:
        >>> with atomic("report.json") as name:
        ...     _ = name.write_text("{}")
    """
    if not isinstance(path, str | os.PathLike):
        raise ArgumentTypeError(f"the path of a file is needed, got {type(path).__name__}.")
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        kind = "folder" if target.is_dir() else "device or pipe"
        raise ExportError(f"'{path}' was to be written, but it is a {kind}. Give the name of a file.")
    if not target.parent.is_dir():
        raise ExportError(f"'{path}' was to be written, but the folder '{target.parent}' does not exist. Create it.")
    folder, moved = None, []
    try:
        folder = Path(tempfile.mkdtemp(prefix=".fxprune-", dir=target.parent))
        yield folder / target.name
        if target.exists():
            shutil.copymode(target, folder / target.name)
        for part in sorted(folder.iterdir(), key=lambda part: part.name == target.name):
            synchronize(part)
            os.replace(part, target.parent / part.name)
            moved.append(target.parent / part.name)
        synchronize(target.parent)
    except OSError as error:
        if target not in moved:
            for part in moved:
                part.unlink(missing_ok=True)
        reason = _REASONS.get(error.errno or 0, f"{type(error).__name__}: {error}")
        raise ExportError(f"'{path}' could not be written: {reason}. What stood there before is unchanged.") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def synchronize(path: Path) -> None:
    """Have a file or folder on the disk before anything else is done."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
