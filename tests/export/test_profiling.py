"""`profile`: time by operator, counted where each kernel ran."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from fxprune.errors import ArgumentError, ArgumentTypeError, CompareError, SuffixError
from fxprune.export import profile
from fxprune.export.profiling import OperatorTime, by_operator


def chain(path: Path) -> Path:
    """Three products of [n, 96, 96] with the input, and one sine."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 96, 96]) for name in ("x", "y")]
    nodes = [helper.make_node("MatMul", [a, "x"], [b], name=b) for a, b in (("x", "a"), ("a", "b"), ("b", "c"))]
    graph = helper.make_graph([*nodes, helper.make_node("Sin", ["c"], ["y"], name="y")], "g", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_operators_are_counted_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = profile(chain(tmp_path / "chain.onnx"), batch=4, rounds=5)
    assert {name: each.nodes for name, each in found.operators.items()} == {"MatMul": 3, "Sin": 1}
    assert next(iter(found.operators)) == "MatMul"  # 7 million multiply-adds against 37 thousand sines
    assert found.milliseconds == pytest.approx(sum(each.milliseconds for each in found.operators.values()))
    assert [path.name for path in tmp_path.iterdir()] == ["chain.onnx"]  # the profiler's own file is gone
    assert json.loads(json.dumps(found.to_dict()))["operators"]["Sin"]["nodes"] == 1
    assert "MatMul" in str(found)
    assert "5 runs" in found.table()


def test_inputs_can_be_given(tmp_path: Path) -> None:
    path = chain(tmp_path / "chain.onnx")
    assert profile(path, inputs=torch.zeros(2, 96, 96), rounds=1).rounds == 1
    with pytest.raises(CompareError):
        profile(path, inputs=torch.zeros(2, 96, 96, dtype=torch.int64), rounds=1)


def event(name: str, begin: int, spent: int, operator: str | None = None) -> dict[str, Any]:
    if operator is None:
        return {"name": name, "cat": "Session", "ts": begin, "dur": spent}
    return {"name": f"{name}_kernel_time", "cat": "Node", "ts": begin, "dur": spent, "args": {"op_name": operator}}


def test_warmup_does_not_count_and_loops_count_by_what_is_inside() -> None:
    events = [
        event("model_run", 0, 99),
        event("a", 1, 90_000, "Conv"),
        event("model_run", 100, 99),
        event("a", 101, 1000, "Conv"),
        event("b", 110, 2000, "Conv"),
        event("loop", 120, 50_000, "Loop"),
        event("inner", 121, 4000, "Add"),
        event("inner", 125, 4000, "Add"),
        event("model_run", 200, 99),
        event("a", 201, 3000, "Conv"),
        event("inner", 221, 2000, "Add"),
    ]
    found = by_operator(events, 2)
    assert found == {"Add": OperatorTime(1, 5.0), "Conv": OperatorTime(2, 3.0)}


def test_bad_input(tmp_path: Path) -> None:
    path = chain(tmp_path / "chain.onnx")
    with pytest.raises(ArgumentError, match="0 rounds"):
        profile(path, rounds=0)
    with pytest.raises(ArgumentTypeError, match="rounds=1.5"):
        profile(path, rounds=1.5)  # type: ignore[arg-type]
    with pytest.raises(CompareError, match="nothing of that name"):
        profile(tmp_path / "missing.onnx")
    with pytest.raises(SuffixError):
        profile(tmp_path / "model.pt2")
    with pytest.raises(ArgumentError, match="2 calls"):
        profile(path, inputs=[torch.zeros(1, 96, 96), torch.zeros(1, 96, 96)])
    with pytest.raises(CompareError, match="NoSuch"):
        profile(path, providers=["NoSuchExecutionProvider"])
