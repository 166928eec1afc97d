"""Atomic writes: the old file or the new one, never half of one, and nothing left behind."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fxprune
from fxprune.errors import ExportError
from fxprune.files import atomic


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "file.txt"
    path.write_text("old")
    return path


def write(target: Path, then: Callable[[Path], object]) -> None:
    with atomic(target) as name:
        name.write_text("half")
        then(name)


def assert_untouched(target: Path) -> None:
    assert target.read_text() == "old"
    assert [item.name for item in target.parent.iterdir()] == [target.name]


def test_replaces_an_existing_file_and_keeps_its_permission_bits(target: Path) -> None:
    target.chmod(0o640)
    with atomic(target) as name:
        name.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert list(target.parent.iterdir()) == [target]


def test_a_new_file_gets_the_bits_that_open_gives(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with atomic(tmp_path / "written") as name:
        name.touch()
    assert (tmp_path / "written").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_follows_a_link(target: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(target)
    with atomic(link) as name:
        name.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_takes_a_name_relative_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with atomic("name") as name:
        name.touch()
    assert [item.name for item in tmp_path.iterdir()] == ["name"]


def test_an_error_in_the_block_leaves_the_old_file(target: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        write(target, lambda name: 1 / 0)
    assert_untouched(target)


def test_a_block_that_writes_nothing_is_an_error(target: Path) -> None:
    with pytest.raises(ExportError, match="could not be written"), atomic(target):
        pass
    assert_untouched(target)


def test_refuses_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="it is a folder"), atomic(tmp_path):
        pass


def test_refuses_a_device() -> None:
    with pytest.raises(ExportError, match="it is a device"), atomic("/dev/null"):
        pass
    assert Path("/dev/null").is_char_device()


def test_refuses_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="does not exist"), atomic(tmp_path / "no" / "file"):
        pass


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_read_only_folder(target: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(**_: Any) -> str:  # permission bits do not bind the superuser, so the refusal is simulated
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(ExportError, match="read-only"), atomic(target):
        pass
    assert_untouched(target)


def test_full_disk(target: Path) -> None:
    with pytest.raises(ExportError, match="the disk is full"):
        write(target, lambda name: Path("/dev/full").write_text("rest"))
    assert_untouched(target)


def test_file_size_limit(target: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(ExportError, match="larger than the limit"), atomic(target) as name:
            name.write_bytes(b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_untouched(target)


def test_killed_while_writing_leaves_the_old_file(target: Path) -> None:
    package = Path(fxprune.__file__).parent
    code = f"""
import os, signal, sys, types
sys.modules["fxprune"] = types.ModuleType("fxprune")  # without torch, which takes seconds to import
sys.modules["fxprune"].__path__ = [{str(package)!r}]
from fxprune.files import atomic
with atomic({str(target)!r}) as name:
    name.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert target.read_text() == "old"


def test_two_writers_of_one_path(target: Path) -> None:
    with atomic(target) as first, atomic(target) as second:
        assert first != second
        first.write_text("1" * 1000)
        second.write_text("2" * 1000)
    assert target.read_text() == "1" * 1000  # the one that ended last
    assert list(target.parent.iterdir()) == [target]


def test_side_files_stand_before_the_main_file(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), replace(a, b)))
    with atomic(target) as name:
        for part in ("a.data", name.name, "z.data"):
            name.with_name(part).write_text(part)
    assert sorted(order[:2]) == ["a.data", "z.data"]
    assert order[2:] == ["file.txt"]


def test_side_files_go_when_the_main_file_cannot_be_moved(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def fail(a: Path, b: Path) -> None:
        if b == target:
            raise OSError(errno.ENOSPC, "full")
        replace(a, b)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ExportError, match="disk is full"):
        write(target, lambda name: name.with_name("side.data").write_text("side"))
    assert_untouched(target)
