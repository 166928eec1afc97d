"""`to_program` and `to_torchscript`: files that torch reads without the model's code, verified and whole."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import ArgumentTypeError, CompareError, ExportError
from fxprune.export import FileReport, compare, to_onnx, to_program, to_torchscript
from fxprune.export.runners import ProgramRunner
from tests.export.test_onnx import Everything, Network
from tests.networks import NETWORKS
from tests.tensor_memory import most_private

FORMATS: dict[str, Callable[..., FileReport]] = {".pt2": to_program, ".pt": to_torchscript}


@pytest.fixture(scope="module")
def networks() -> dict[str, fxprune.TracedModule]:
    """Pruned and finalized."""
    found = {}
    for key, (build, sample, names) in NETWORKS.items():
        torch.manual_seed(0)
        traced = fxprune.trace(build(), (sample(2),), modes=("eval",))
        for name in names:
            fxprune.prune.l1_unstructured(traced, name, amount=0.5)
        found[key] = fxprune.finalize(traced)
    return found


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("key", NETWORKS)
def test_networks_in_both_formats(
    networks: dict[str, fxprune.TracedModule], tmp_path: Path, suffix: str, key: str
) -> None:
    path = tmp_path / f"model{suffix}"
    report = FORMATS[suffix](networks[key], path)
    assert list(tmp_path.iterdir()) == [path]
    assert report.size == path.stat().st_size
    assert report.comparison is not None
    assert [row.shape[0] for row in report.comparison.rows] == [2, 3, 1]
    result = compare(networks[key], path, inputs=NETWORKS[key][1](5), rtol=0 if suffix == ".pt2" else 1e-6)
    assert result.ok, result.table()
    assert json.loads(json.dumps(report.to_dict()))["comparison"]["ok"]


def test_a_program_is_compared_without_being_read_into_memory(tmp_path: Path) -> None:
    layers, width = 12, 1024
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)), nn.BatchNorm1d(width))
    traced = fxprune.trace(model.eval(), (torch.randn(2, width),), modes=("eval",))
    path, size = tmp_path / "model.pt2", layers * width * width * 4
    to_program(traced, path, verify=False)
    before, outputs = path.read_bytes(), []
    held = most_private(lambda: outputs.append(ProgramRunner(path).run((torch.ones(2, width),), {})))
    assert held < 0.25 * size
    assert torch.equal(outputs[0]["output"], model(torch.ones(2, width)))
    assert path.read_bytes() == before


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_kind_of_input_and_output(tmp_path: Path, suffix: str) -> None:
    x, kwargs = torch.randn(2, 4), {"unused": torch.ones(2, 5), "times": 3, "cfg": {"z": torch.randn(2, 3)}}
    traced = fxprune.trace(Everything().eval(), (x,), kwargs, modes=("eval",))
    path = tmp_path / f"model{suffix}"
    FORMATS[suffix](traced, path)
    result = compare(traced, path, inputs=[fxprune.export.Call((x,), kwargs), {"relu": x, **kwargs}])
    assert result.ok, result.table()
    assert len(result.rows) == 16


class Counting(nn.Module):
    """Counts its calls, by which it scales what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layer(x) * self.calls


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_what_calls_leave_in_a_buffer_goes_on_in_the_file_and_not_from_comparison_to_comparison(
    tmp_path: Path, suffix: str
) -> None:
    traced = fxprune.trace(Counting().eval(), torch.randn(2, 3), modes=("eval",))
    path = tmp_path / f"model{suffix}"
    FORMATS[suffix](traced, path)
    calls = [torch.randn(n, 3) for n in (1, 2, 3)]
    assert compare(traced, path, inputs=calls).ok
    model = torch.export.load(path).module() if suffix == ".pt2" else torch.jit.load(path)
    for x in calls:
        torch.testing.assert_close(model(x), traced(x))
    assert traced.get_buffer("calls") == 3


def test_a_file_without_state_says_so(tmp_path: Path) -> None:
    traced = fxprune.trace(Counting().eval(), torch.randn(2, 3), modes=("eval",))
    report = fxprune.export.to_onnx(traced, tmp_path / "model.onnx")
    assert any("writes into calls" in note for note in report.notes)


READER = """
import pathlib, sys, torch
x, y, *paths = sys.argv[1:]
for path in paths:
    model = torch.export.load(path).module() if path.endswith('.pt2') else torch.jit.load(path)
    torch.testing.assert_close(model(torch.load(x)), torch.load(y), rtol=1e-6, atol=1e-6)
    print(pathlib.Path(path).name)
assert not [name for name in sys.modules if name.startswith('fxprune') or name.endswith('tests.networks')]
"""


@pytest.mark.slow
def test_the_files_are_read_without_the_models_code(networks: dict[str, fxprune.TracedModule], tmp_path: Path) -> None:
    final, x = networks["residual"], torch.randn(3, 3, 6, 6)
    paths = [export(final, tmp_path / f"model{suffix}").path for suffix, export in FORMATS.items()]
    torch.save(x, tmp_path / "x")
    torch.save(final(x).detach(), tmp_path / "y")
    command = [sys.executable, "-W", "ignore", "-I", "-c", READER, tmp_path / "x", tmp_path / "y", *paths]
    done = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["model.pt2", "model.pt"]


def test_a_program_keeps_names_and_says_what_it_is(networks: dict[str, fxprune.TracedModule], tmp_path: Path) -> None:
    final, files = networks["residual"], {"fxprune.json": ""}
    path = to_program(final, tmp_path / "model.pt2").path
    program = torch.export.load(path, extra_files=files)
    assert program.state_dict.keys() == {k for k in final.state_dict() if "num_batches" not in k}
    assert json.loads(files["fxprune.json"])["fxprune.version"] == fxprune.__version__


@pytest.mark.usefixtures("stack_traces")
@pytest.mark.parametrize(("suffix", "write"), [(".onnx", to_onnx), *FORMATS.items(), (".fxp", fxprune.save)])
def test_no_file_says_where_the_models_source_is(suffix: str, write: Callable[..., Any], tmp_path: Path) -> None:
    traced = fxprune.trace(Network(), torch.randn(3, 2, 6, 6), modes=("eval",))
    source = sys.modules[Network.__module__].__file__
    assert source is not None
    assert any(source in str(node.meta.get("stack_trace")) for node in traced.graph.nodes)
    write(traced, path := tmp_path / f"model{suffix}")
    assert source.encode() not in path.read_bytes()


def test_a_mask_inside_a_norm_folds_to_one_parameter(tmp_path: Path) -> None:
    traced = fxprune.trace(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(2, 4))
    fxprune.weight_norm(traced, "0.weight")
    every_other = torch.arange(24).reshape(6, 4) % 2  # a row of zeros has no direction
    fxprune.prune.custom_from_mask(traced, "0.parametrizations.weight.original1", every_other)
    path = to_program(traced.eval(), tmp_path / "model.pt2").path
    stored = torch.export.load(path).state_dict
    assert stored.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert int((stored["0.weight"] == 0).sum()) == 12
    assert compare(traced, path, inputs=torch.randn(5, 4), rtol=0).ok


def test_torchscript_is_frozen(networks: dict[str, fxprune.TracedModule], tmp_path: Path) -> None:
    path = to_torchscript(networks["residual"], tmp_path / "model.pt").path
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        script = torch.jit.load(path)
    assert not list(script.parameters())
    assert "batch_norm" not in str(script.graph)


# ---- bad input


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_that_computes_something_else_is_kept_aside(
    networks: dict[str, fxprune.TracedModule], tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flatten = fxprune.export.program.flatten

    def wrong(*arguments: Any, **options: Any) -> Any:
        flat = flatten(*arguments, **options)
        flat.module.head.weight = nn.Parameter(flat.module.head.weight + 0.01)
        return flat

    monkeypatch.setattr("fxprune.export.program.flatten", wrong)
    old = tmp_path / f"model{suffix}"
    old.write_text("old")
    with pytest.raises(ExportError, match="computes something else"):
        FORMATS[suffix](networks["residual"], old)
    assert old.read_text() == "old"
    assert sorted(part.name for part in tmp_path.iterdir()) == [f"model.mismatch{suffix}", old.name]


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_is_refused(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    export = FORMATS[suffix]
    with pytest.raises(ArgumentTypeError, match="was given a Linear"):
        export(nn.Linear(2, 2), tmp_path / f"a{suffix}")
    traced = fxprune.trace(nn.Linear(2, 2), torch.ones(2, 2), modes=("eval",))
    with pytest.raises(ExportError, match=f"must end in {suffix}"):
        export(traced, tmp_path / "a.bin")
    with pytest.raises(ExportError, match="does not exist"):
        export(traced, tmp_path / "no" / f"a{suffix}")
    monkeypatch.setattr(torch.export, "export", lambda *a, **k: 1 / 0)
    with pytest.raises(ExportError, match=f"torch cannot write the model as {suffix}: ZeroDivisionError"):
        export(traced, tmp_path / f"a{suffix}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", FORMATS)
def test_damaged_files_and_wrong_inputs_are_named(tmp_path: Path, suffix: str) -> None:
    traced = fxprune.trace(Network(), torch.randn(2, 2, 6, 6), modes=("eval",))
    path = FORMATS[suffix](traced, tmp_path / f"model{suffix}").path
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(path.read_bytes()[:500])
    for bad in (cut, tmp_path / f"no{suffix}"):
        with pytest.raises(CompareError, match=f"{bad.name}' cannot be loaded by torch"):
            compare(path, bad, inputs=torch.randn(2, 2, 6, 6))
    with pytest.raises(CompareError, match=f"model{suffix} cannot run these inputs"):
        compare(path, path, inputs=torch.randn(2, 7, 6, 6))
    with pytest.raises(CompareError, match="has no train mode"):
        compare(traced, path, inputs=torch.randn(2, 2, 6, 6), mode="train")
