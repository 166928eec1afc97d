"""Files whose weights lie beside them are verified without a copy of these."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.export import onnx, onnx_files
from fxprune.export.session import Session

LAYERS, WIDTH = 3, 1024


def _private_bytes() -> int:
    """What this process holds alone; files that are mapped are not among it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def _let_go_of_what_is_free() -> None:
    """Give freed memory back, so that what is needed next has to be asked for."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _watched(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each session of a verification from now on, whether weights were packed."""
    packed = []

    class Watched(Session):
        def __init__(self, *args: Any, packs: bool = True, **options: Any) -> None:
            packed.append(packs)
            super().__init__(*args, packs=packs, **options)

    monkeypatch.setattr(onnx, "Session", Watched)
    return packed


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[bool]]:
    """A file with weights beside it, and for each session of its verification whether weights were packed."""
    packed = _watched(monkeypatch)
    monkeypatch.setattr(onnx_files, "SINGLE_FILE_BYTES", 2**20)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    traced = fxprune.trace(model, (torch.randn(2, 5, WIDTH),), modes=("eval",))
    path = tmp_path / "model.onnx"
    report = fxprune.export.to_onnx(traced, path)
    assert report.comparison is not None
    assert report.comparison.ok
    assert len(list(tmp_path.iterdir())) == 2
    return path, packed


def test_weights_beside_a_file_are_read_where_they_are(written: tuple[Path, list[bool]]) -> None:
    path, packed = written
    assert packed == [False]
    x = torch.randn(3, 5, WIDTH)
    held, results = {}, {}
    for packs in (True, False):
        _let_go_of_what_is_free()
        before = _private_bytes()
        session = Session(path, threads=1, packs=packs)
        results[packs] = session.run(x)["output"]
        held[packs] = (_private_bytes() - before) / (LAYERS * WIDTH * WIDTH * 4)
        del session
    assert torch.allclose(results[True], results[False], rtol=1e-5, atol=1e-5)
    assert held[False] < 0.3
    assert held[False] < held[True] / 2


def test_weights_within_a_file_are_packed_as_they_will_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = _watched(monkeypatch)
    traced = fxprune.trace(nn.Linear(4, 2), (torch.randn(2, 4),), modes=("eval",))
    fxprune.export.to_onnx(traced, tmp_path / "model.onnx")
    assert packed == [True]
