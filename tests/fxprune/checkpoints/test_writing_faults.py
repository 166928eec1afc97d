"""A full disk, a read-only folder, a killed or a second writer: a file is the old one or the new one, whole."""

from __future__ import annotations

import os
import resource
import signal
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import fxprune
from fxprune.errors import ExportError


def _old(path: Path) -> Callable[[], None]:
    path.write_bytes(b"old")

    def check() -> None:
        assert path.read_bytes() == b"old"
        assert [item.name for item in path.parent.iterdir()] == [path.name]

    return check


def test_full_disk_and_read_only_folder_leave_the_old_file(
    tmp_path: Path, traced: fxprune.TracedModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = _old(tmp_path / "m")
    for limit in (100, 9_000, 30_000):  # inside the header, the tensors, a program
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(ExportError, match="larger than the limit"):
                fxprune.save(traced, tmp_path / "m")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        check()
    monkeypatch.setattr(zipfile.ZipFile, "writestr", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(ExportError, match="the disk is full"):
        fxprune.save(traced, tmp_path / "m")
    check()
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **_: (_ for _ in ()).throw(OSError(30, "Read-only")))
    with pytest.raises(ExportError, match="read-only"):
        fxprune.save(traced, tmp_path / "m")
    check()


def _child(work: Callable[[], object]) -> int:
    """Run in a process of its own; returns its id."""
    if not (process := os.fork()):
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return process


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_and_competing_writers(
    path: Path, captured: fxprune.TracedModule, shrunk: fxprune.TracedModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    fxprune.save(shrunk, other := path.with_name("other"))
    contents = path.read_bytes(), other.read_bytes()
    write = zipfile.ZipFile.writestr

    def killed(archive: zipfile.ZipFile, item: zipfile.ZipInfo, content: bytes) -> None:
        if item.filename == "eval.pt2":
            os.kill(os.getpid(), signal.SIGKILL)
        write(archive, item, content)

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "writestr", killed)
        process = _child(lambda: fxprune.save(shrunk, path))
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    assert path.read_bytes() == contents[0]  # the old one, though it was being replaced
    running = [_child(lambda m=m: [fxprune.save(m, path) for _ in range(4)]) for m in (captured, shrunk)]
    while running:
        time.sleep(0.001)
        assert path.read_bytes() in contents  # a reader sees one whole file
        for process in list(running):
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                assert os.waitstatus_to_exitcode(status) == 0
                running.remove(process)
    assert path.read_bytes() in contents
