"""Files with many weights are written one weight at a time, and verified without a copy where these lie beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from onnx import load
from onnx.checker import check_model
from torch import nn
from torch.onnx import ONNXProgram

import fxprune
from fxprune.export import onnx, onnx_files
from fxprune.export.session import Session
from tests.tensor_memory import most_private

LAYERS, WIDTH = 12, 1024


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

    def run(packs: bool) -> None:
        results[packs] = Session(path, threads=1, packs=packs).run(x)["output"]

    for packs in (True, False):
        held[packs] = most_private(lambda packs=packs: run(packs)) / (LAYERS * WIDTH * WIDTH * 4)
    assert torch.allclose(results[True], results[False], rtol=1e-5, atol=1e-5)
    assert held[False] < 0.3
    assert held[False] < held[True] / 2


def test_weights_within_a_file_are_packed_as_they_will_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = _watched(monkeypatch)
    traced = fxprune.trace(nn.Linear(4, 2), (torch.randn(2, 4),), modes=("eval",))
    fxprune.export.to_onnx(traced, tmp_path / "model.onnx")
    assert packed == [True]


class _Branches(nn.Module):
    """Weights of several types and sizes, some within the bodies of a branch, one that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 16)
        self.inner, self.outer = nn.Linear(16, 16), nn.Linear(16, 300, bias=False)
        self.outer.weight = self.table.weight
        self.register_buffer("index", torch.arange(200).flip(0))
        self.register_buffer("narrow", torch.rand(3, 16).half())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(self.index[ids])
        x = torch.cond(x.sum() > 0, lambda x: self.inner(x), lambda x: x * 2.0, (x,))
        return self.outer(x + self.narrow.sum(0).float())


def test_a_file_that_is_put_together_is_what_protobuf_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    programs = []

    def saved(program: ONNXProgram, path: Path) -> None:
        programs.append(program)
        onnx_files.save(program, path)

    monkeypatch.setattr(onnx, "save", saved)
    traced = fxprune.trace(_Branches(), (torch.arange(6).reshape(2, 3),), modes=("eval",))
    path = tmp_path / "model.onnx"
    report = fxprune.export.to_onnx(traced, path)
    assert report.comparison is not None
    assert report.comparison.ok
    (program,) = programs
    expected, found = program.model_proto, load(path)
    assert len(found.graph.initializer) > 4
    assert found == expected
    assert path.stat().st_size == expected.ByteSize()
    check_model(path, full_check=True)


def test_a_file_in_one_holds_one_weight_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size, held = LAYERS * WIDTH * WIDTH * 4, []

    def saved(program: ONNXProgram, path: Path) -> None:
        held.append(most_private(lambda: onnx_files.save(program, path)) / size)

    monkeypatch.setattr(onnx, "save", saved)
    for width in (64, WIDTH, WIDTH, WIDTH):  # with the small one, what is loaded once
        layers = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(LAYERS)))
        traced = fxprune.trace(layers, (torch.randn(2, width),), modes=("eval",))
        fxprune.export.to_onnx(traced, tmp_path / "model.onnx", verify=False)
    assert min(held[1:]) < 0.4  # a message, and its bytes, of one weight in twelve
