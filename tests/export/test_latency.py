"""`bench`: every file in turn, ratios to the first, and inputs of every kind."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from fxprune.errors import ArgumentError, CompareError
from fxprune.export import Session, bench


def product(path: Path, times: int) -> Path:
    """`times` products of an input of shape [n, 200, 200] with itself, and an index that is not read."""
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 200, 200]) for n in ("x", "y")]
    index = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "length"])
    names = ["x", *(f"v{i}" for i in range(times - 1)), "y"]
    nodes = [helper.make_node("MatMul", [a, "x"], [b]) for a, b in pairwise(names)]
    graph = helper.make_graph(nodes, "g", [ends[0], index], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_ratio_to_the_first(tmp_path: Path) -> None:
    one, eight = product(tmp_path / "one.onnx", 1), product(tmp_path / "eight.onnx", 8)
    first, second, again = bench([one, eight, one], batch=2, rounds=15)
    assert (first.name, second.name, first.ratio, first.rounds) == ("one.onnx", "eight.onnx", 1.0, 15)
    assert second.ratio > 3  # eight times the work; how much more depends on caches
    assert again.ratio < second.ratio
    assert first.quartiles[0] <= first.median <= first.quartiles[1]


def test_files_run_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    feeds: list[Any] = []
    monkeypatch.setattr(Session, "bind", lambda self, feed: (feeds.append(feed), lambda: order.append(self.name))[1])
    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    paths = [product(tmp_path / f"{name}.onnx", 1) for name in "ab"]
    a, b = bench(paths, batch=3, rounds=2, warmup=1)
    assert order == ["a.onnx", "b.onnx"] * 3
    assert (a.median, a.quartiles, b.ratio) == (1000.0, (1000.0, 1000.0), 1.0)
    assert {k: (v.shape, str(v.dtype)) for k, v in feeds[0].items()} == {
        "x": ((3, 200, 200), "float32"), "ids": ((3, 1), "int64")
    }  # fmt: skip
    given = {"x": torch.zeros(1, 200, 200), "ids": torch.zeros(1, 4, dtype=torch.int64)}
    bench(paths, inputs=given, rounds=1)
    assert feeds[-1]["x"].sum() == 0


def test_bad_input(tmp_path: Path) -> None:
    path = product(tmp_path / "a.onnx", 1)
    with pytest.raises(ArgumentError, match="0 files"):
        bench([])
    with pytest.raises(ArgumentError, match="0 rounds"):
        bench([path], rounds=0)
    with pytest.raises(CompareError, match="this build offers"):
        bench([path], providers=["NoSuchProvider"])
    with pytest.raises(CompareError, match="cannot run these inputs"):
        bench([path], inputs=(torch.zeros(1, 3, 3), torch.zeros(1, 1, dtype=torch.int64)))
    with pytest.raises(CompareError, match="there is nothing of that name"):
        bench([tmp_path / "no.onnx"])
