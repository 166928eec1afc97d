"""Graphs in a file: structured inputs, free axes, control flow, and a process that has no code of the model."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fxprune
from fxprune.errors import ArtifactError
from tests.fxprune.checkpoints.twins import X
from tests.networks import Residual


@dataclasses.dataclass
class Pair:
    left: Tensor
    right: Tensor


class Structured(nn.Module):
    def forward(self, x: Tensor, /, pair: Pair, *more: Tensor, times: int, cfg: dict[str, Any]) -> Any:
        return {"a": x * times + pair.left, "b": (more[0] + cfg["z"], None, 3)}


@pytest.mark.filterwarnings("ignore::fxprune.errors.BatchSpecializedWarning")
def test_structured_inputs_and_outputs(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    args, kwargs = (x, Pair(x, torch.ones(2)), x + 1), {"times": 3, "cfg": {"z": torch.randn(2, 4), "s": "text"}}
    traced = fxprune.trace(Structured(), args, kwargs)
    fxprune.save(traced, tmp_path / "m")
    loaded = fxprune.load(tmp_path / "m")
    assert loaded.example_args[0] is loaded.example_args[1].left  # one tensor at the capture, so one tensor now
    assert loaded.run_example()[0].tolist() == traced.run_example()[0].tolist()
    assert loaded(*args, **kwargs).keys() == {"a", "b"}
    assert loaded.run_example("train")[2:] == [None, 3]
    with pytest.raises(fxprune.FxpruneError, match="holds for 3 only"):
        loaded(*args, **(kwargs | {"times": 4}))


class Checked(nn.Module):
    """A size that comes of values, which is checked, as models of transformers check their ends of sentences."""

    def __init__(self, is_number: bool) -> None:
        super().__init__()
        self.is_number = is_number

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        count = torch.unique_consecutive(ids.sum(1)).shape[0]
        torch._check(count == 1 if self.is_number else count >= 1)
        return x.mul(2)


@pytest.mark.parametrize("is_number", [True, False])
def test_sizes_that_come_of_values_are_checked_by_what_is_read(is_number: bool, tmp_path: Path) -> None:
    sample = torch.randn(2, 4), torch.ones(2, 3, dtype=torch.long)
    traced = fxprune.trace(Checked(is_number).eval(), sample, modes=("eval",))
    fxprune.save(traced, tmp_path / "m")
    fxprune.export.to_program(traced, tmp_path / "m.pt2")
    x, ids, uneven = torch.randn(3, 4), torch.ones(3, 3, dtype=torch.long), torch.eye(3).long().cumsum(1)
    for loaded in (traced, fxprune.load(tmp_path / "m"), fxprune.load(tmp_path / "m.pt2")):
        assert torch.equal(loaded(x, ids), x * 2)
        if is_number:
            with pytest.raises(RuntimeError, match="Runtime assertion failed"):
                loaded(x, uneven)
        else:
            assert torch.equal(loaded(x, uneven), x * 2)


READER = """
import sys, torch, fxprune
loaded = fxprune.load(sys.argv[1])
assert torch.equal(loaded.eval()(torch.ones(5, 3, 6, 6)), torch.load(sys.argv[3]))
assert fxprune.prune.is_pruned(loaded) and not any(name.startswith("tests") for name in sys.modules)
try:
    fxprune.load(sys.argv[2])
except fxprune.FxpruneError as error:
    print(error)
"""


@pytest.mark.filterwarnings("ignore::fxprune.errors.BatchSpecializedWarning")
def test_a_process_without_the_models_code(path: Path, captured: fxprune.TracedModule) -> None:
    class Twice(nn.Module):
        def forward(self, pair: Pair) -> Tensor:
            return pair.left * pair.right

    fxprune.save(fxprune.trace(Twice(), (Pair(torch.ones(2), torch.ones(2)),)), path.with_name("own class"))
    torch.save(copy.deepcopy(captured).eval()(torch.ones(5, 3, 6, 6)).detach(), path.with_name("want"))
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READER, path, path.with_name("own class"), path.with_name("want")],
        check=True, capture_output=True, text=True, cwd=path.parent,
        env=os.environ | {"PYTHONPATH": str(Path(fxprune.__file__).parent.parent)},
    )  # fmt: skip
    assert "test_stored_graphs.Pair in pytree is not registered" in found.stdout
    assert "torch.export.register_dataclass" in found.stdout


def test_what_has_no_form_as_data_is_named(tmp_path: Path) -> None:
    traced = fxprune.trace(Residual(), (X,))
    traced.register_buffer("sparse", torch.eye(3).to_sparse())
    with pytest.raises(ArtifactError, match="the module cannot be stored: .*programs=False stores everything else"):
        fxprune.save(traced, tmp_path / "m")
    assert not list(tmp_path.iterdir())


class Sizes(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x, x], 1)[:, :, None] + y[:, :, None].cumsum(0).relu() * y.shape[0]


N, B = Dim("n", min=3, max=50), Dim("b")


@pytest.mark.parametrize(
    "shapes",
    [
        "batch",
        None,
        {"x": {0: B, 1: N}, "y": {0: B, 1: 2 * N}},
        {"x": (Dim.AUTO, Dim.DYNAMIC(min=2, max=40)), "y": (Dim.AUTO, Dim.AUTO)},
    ],
)
def test_dynamic_axes_come_back(tmp_path: Path, shapes: Any) -> None:
    traced = fxprune.trace(Sizes(), (torch.randn(4, 5), torch.randn(4, 10)), dynamic_shapes=shapes)
    fxprune.save(traced, tmp_path / "m")
    alone, into_model = fxprune.load(tmp_path / "m"), fxprune.load(tmp_path / "m", Sizes())
    sizes = [(4, 5)] + [(7, 5)] * (shapes is not None) + [(6, 9)] * (shapes not in (None, "batch"))
    for batch, width in sizes:
        inputs = torch.randn(batch, width), torch.randn(batch, 2 * width)
        want = traced(*inputs)
        assert torch.equal(alone(*inputs), want)
        assert torch.equal(into_model(*inputs), want)
    if shapes in (None, "batch"):
        for module in (alone, into_model, traced):
            with pytest.raises(fxprune.FxpruneError):
                module(torch.randn(9, 60), torch.randn(9, 120))
    assert [i.sizes for i in alone.input_check.inputs] == [i.sizes for i in traced.input_check.inputs]
    report = fxprune.export.to_program(alone, tmp_path / "m.pt2")
    assert report.comparison is not None
    assert report.comparison.ok


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.table = [torch.randn(4)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.lin(x) + self.table[0]
        return torch.cond(x.sum() > 0, lambda v: v.sin() * 2, lambda v: (v - 1).cos(), (x,))


def test_control_flow_and_constants(tmp_path: Path) -> None:
    traced = fxprune.trace(Branches(), (torch.randn(2, 4),), dynamic_shapes=None)
    fxprune.prune.l1_unstructured(traced, "lin.weight", amount=0.5)
    fxprune.save(traced, tmp_path / "m")
    fxprune.save(fxprune.load(tmp_path / "m"), tmp_path / "again")
    loaded = fxprune.load(tmp_path / "again")
    for scale in (-9, 9):
        x = torch.full((2, 4), 1.0 * scale)
        for mode in (True, False):
            assert torch.equal(loaded.train(mode)(x), traced.train(mode)(x))
