"""Files that are cut, altered, of a later version or no checkpoint at all are named, and nothing is restored."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fxprune
from fxprune.errors import ArtifactError
from tests.fxprune.checkpoints.twins import rewritten


def _header(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, bytes]], None]:
    def edit(members: dict[str, bytes]) -> None:
        header = json.loads(members["fxprune.json"])
        change(header)
        members["fxprune.json"] = json.dumps(header).encode()

    return edit


def test_every_changed_byte_of_a_member_is_noticed(path: Path) -> None:
    content, bad = path.read_bytes(), path.with_name("bad")
    with zipfile.ZipFile(path) as archive:
        items = {item.filename: item for item in archive.infolist()}
    assert items.keys() == {"fxprune.json", "tensors.safetensors", "eval.pt2", "train.pt2"}
    for item in items.values():
        start, size = item.header_offset + 30 + len(item.filename), item.file_size
        for position in range(start, start + size, max(1, size // 40)):
            bad.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
            with pytest.raises(ArtifactError, match="bad.*cannot be restored.*Bad CRC-32"):
                fxprune.load(bad)


def test_truncated_files_are_named(path: Path) -> None:
    content, bad = path.read_bytes(), path.with_name("bad")
    whole = len(content)
    inside = "what is left ends in another archive"  # that of the last program, which would be read instead
    for length, why in {0: "", 1: "", 100: "", whole // 2: "truncated", whole - 100: inside, whole - 1: ""}.items():
        bad.write_bytes(content[:length])
        with pytest.raises(ArtifactError, match=why or "truncated or altered must be written again"):
            fxprune.load(bad)


@pytest.mark.parametrize("member", ["tensors.safetensors", "eval.pt2"])
def test_members_of_another_file_are_noticed(path: Path, shrunk: fxprune.TracedModule, member: str) -> None:
    fxprune.save(shrunk, other := path.with_name("other"))
    with zipfile.ZipFile(other) as archive:
        content = archive.read(member)
    with pytest.raises(ArtifactError, match=f"{member} is not what was written: altered"):
        fxprune.load(rewritten(path, lambda members: members.update({member: content})))
    with pytest.raises(ArtifactError, match=f"{member} is not what was written: missing"):
        fxprune.load(rewritten(path, lambda members: members.pop(member)))


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "eval.pt2.pkl"])
def test_members_that_do_not_belong_are_refused(path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match=f"members that no checkpoint has: '{name}'"):
        fxprune.load(rewritten(path, lambda members: members.update({name: b"x"})))
    assert not any("evil" in item.name for item in path.parent.iterdir())


def test_compressed_and_repeated_members_are_refused(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ArtifactError, match="compressed"):
        fxprune.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in [*members.items(), ("eval.pt2", b"another")]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                archive.writestr(name, content)
    with pytest.raises(ArtifactError, match="members twice"):
        fxprune.load(path)


def test_later_versions_and_damaged_headers_are_named(path: Path) -> None:
    later = _header(lambda h: h.update(format=7, version="9.0"))
    with pytest.raises(ArtifactError, match="format 7, written by fxprune 9.0; this version reads up to 1"):
        fxprune.load(rewritten(path, later))
    for damage in (
        lambda h: h.pop("tensors"),
        lambda h: h.update(format="x"),
        lambda h: h["tensors"].pop("stem.bias_mask"),
        lambda h: h["inputs"].update(leaves=[]),
        lambda h: h["modules"].pop(0),
        lambda h: h.update(plan="{}"),
        lambda h: h["graphs"]["eval"]["origins"].update(x={}),
    ):
        with pytest.raises(ArtifactError):
            fxprune.load(rewritten(path, _header(damage)))


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    torch.save({"a": torch.ones(2)}, tmp_path / "state")
    for name, why in {
        "text": "not a zip",
        "state": "state/data.pkl",
        "no": "No such file",
        ".": "Is a directory",
    }.items():
        with pytest.raises(ArtifactError, match=why):
            fxprune.load(tmp_path / name)
