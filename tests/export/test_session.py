"""Running ONNX files: how inputs find their names, and what damaged files and wrong inputs say."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from fxprune.errors import CompareError
from fxprune.export import Session
from fxprune.export.values import identifier, named_leaves, output_tensors


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """difference = a - b; first = a."""
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 2]) for n in ("a", "b", "difference", "first")]
    nodes = [helper.make_node("Sub", ["a", "b"], ["difference"]), helper.make_node("Identity", ["a"], ["first"])]
    graph = helper.make_graph(nodes, "g", ends[:2], ends[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = tmp_path_factory.mktemp("onnx") / "difference.onnx"
    onnx.save(model, path)
    return path


A, B = torch.full((3, 2), 5.0), torch.ones(3, 2)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((A, B), {}),
        ((A,), {"b": B}),
        ((B,), {"a": A}),
        ((), {"b": B, "a": A}),
        ((), {"x": A, "y": B}),
        (((A, None), [B, 3, "text"]), {}),
        ((A.requires_grad_(), B), {}),
    ],
)
def test_inputs_by_name_and_by_order(file: Path, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    outputs = Session(file).run(args, kwargs)
    assert list(outputs) == ["difference", "first"]
    assert torch.equal(outputs["difference"], torch.full((3, 2), 4.0))
    assert torch.equal(outputs["first"], A)


@pytest.mark.parametrize(
    ("args", "kwargs", "says"),
    [
        ((A,), {}, r"float32 \[3, 2\]"),
        ((A, B, B), {}, "given were 3 by order"),
        ((A,), {"a": A, "b": B}, r"\['a', 'b'\] by name"),
        ((A.double(), B), {}, r"float64 \[3, 2\]"),
        ((torch.ones(3, 5), B), {}, r"\[3, 5\]"),
        ((A.to(torch.bfloat16), B), {}, "bfloat16"),
    ],
)
def test_wrong_inputs_are_named(file: Path, args: tuple[object, ...], kwargs: dict[str, object], says: str) -> None:
    with pytest.raises(CompareError, match=says) as caught:
        Session(file).run(args, kwargs)
    assert "tensor(float) ['n', 2]" in str(caught.value)


def test_damaged_files(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    cases = {"half": whole[: len(whole) // 2], "cut": whole[:-4], "empty": b"", "text": b"not a model\n" * 9}
    for name, content in cases.items():
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(content)
        with pytest.raises(CompareError, match=rf"{name}.onnx' \({len(content)} bytes\) cannot be loaded"):
            Session(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(CompareError, match="there is nothing of that name"):
        Session(tmp_path / "no.onnx")
    with pytest.raises(CompareError, match="there is a folder of that name"):
        Session(tmp_path)


def test_a_provider_that_this_build_lacks_is_no_silent_fall_back(file: Path) -> None:
    with pytest.raises(CompareError, match=r"with \['NoSuchProvider'\]; this build offers .*CPUExecutionProvider"):
        Session(file, ["NoSuchProvider", "CPUExecutionProvider"])


def test_an_output_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    y = helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("SplitToSequence", ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "s.onnx")
    with pytest.raises(CompareError, match=r"'y' of 's\.onnx' is a list"):
        Session(tmp_path / "s.onnx").run((torch.ones(2),), {})


@dataclass
class Plain:
    logits: torch.Tensor
    state: tuple[torch.Tensor, None]


def test_paths_of_leaves() -> None:
    point = namedtuple("point", "x y")
    tree = {"logits": 1, "pair": (2, [3]), "p": point(4, 5), 7: 6}
    assert [path for path, _ in named_leaves(tree)] == ["logits", "pair[0]", "pair[1][0]", "p.x", "p.y", "7"]
    assert named_leaves(8) == [("", 8)]
    assert [path for path, _ in named_leaves((1, 2))] == ["[0]", "[1]"]


@pytest.mark.parametrize(
    ("path", "name"), [("", "output"), ("[0]", "output_0"), ("pair[1]", "pair_1"), ("a.b", "a_b"), ("7", "output_7")]
)
def test_names_for_onnx(path: str, name: str) -> None:
    assert identifier(path, "output") == name


def test_tensors_of_an_output() -> None:
    x = torch.ones(2)
    found = output_tensors({"a": x, "n": None, "k": 3, "d": Plain(x, (x, None))}, "Model")
    assert list(found) == ["a", "k", "d.logits", "d.state[0]"]
    assert found["k"].dtype == torch.int64
    assert list(output_tensors(x, "Model")) == ["output"]
    with pytest.raises(CompareError, match="Model returns a str at 'name'"):
        output_tensors({"name": "text"}, "Model")
    with pytest.raises(CompareError, match="returns a ndarray at 'output'"):
        output_tensors(np.ones(2), "Model")
