"""Programs of `torch.export` become traced modules; what would run code in one is refused before torch reads it."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import ArgumentError, ArtifactError
from tests.fxprune.checkpoints.twins import X, rewritten
from tests.networks import Residual


def test_an_exported_program_becomes_a_traced_module(tmp_path: Path, shrunk: fxprune.TracedModule) -> None:
    path = tmp_path / "model.pt2"
    fxprune.export.to_program(shrunk, path)
    loaded = fxprune.load(path)
    assert loaded.modes == ("eval",)
    for n in (1, 4, 7):
        x = torch.randn(n, 3, 6, 6)
        assert torch.equal(loaded(x), copy.deepcopy(shrunk).eval()(x))
    assert loaded.state_dict().keys() == {n for n in shrunk.state_dict() if "num_batches" not in n}
    fxprune.prune.channels(loaded, amount=0.5)
    final = fxprune.finalize(loaded, align=1)
    assert sum(p.numel() for p in final.parameters()) < sum(p.numel() for p in shrunk.parameters())
    fxprune.export.to_program(final, path)
    fxprune.save(fxprune.load(path), tmp_path / "m")
    assert torch.equal(fxprune.load(tmp_path / "m")(X), final(X))
    with pytest.raises(ArgumentError, match="restored without a model"):
        fxprune.load(path, Residual())


@pytest.mark.filterwarnings("ignore::fxprune.errors.BatchSpecializedWarning")
def test_an_exported_program_of_structured_inputs(tmp_path: Path) -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor, pair: tuple[Tensor, Tensor], *, scale: Tensor) -> dict[str, Tensor]:
            return {"out": x * scale + pair[1]}

    x = torch.randn(3, 4)
    traced = fxprune.trace(Named(), (x, (x + 1, x + 2)), {"scale": x + 3}, modes=("eval",))
    fxprune.export.to_program(traced, tmp_path / "m.pt2")
    loaded, y = fxprune.load(tmp_path / "m.pt2"), torch.randn(5, 4)
    want = traced(y, (y + 1, y + 2), scale=y + 3)["out"]
    assert torch.equal(loaded(y, (y + 1, y + 2), scale=y + 3)["out"], want)
    sample = (x, (x + 1, x + 2)), {"scale": x + 3}
    again = fxprune.trace(loaded, *sample, dynamic_shapes=loaded.dynamic_shapes, modes=("eval",))
    assert torch.equal(again(y, (y + 1, y + 2), scale=y + 3)["out"], want)


# ---- what runs code


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    traced = fxprune.trace(nn.Linear(3, 2), (torch.randn(2, 3),), modes=("eval",))
    return fxprune.export.to_program(traced, tmp_path / "model.pt2").path


def _crafted(kind: str, bomb: bytes, marker: Path) -> Callable[[dict[str, bytes]], None]:
    def edit(members: dict[str, bytes]) -> None:
        root = next(iter(members)).partition("/")[0]
        weights = f"{root}/data/weights/model_weights_config.json"
        model = f"{root}/models/model.json"
        if kind == "pickled weight":
            config = json.loads(members[weights])
            config["config"]["weight"].update(use_pickle=True)
            members[weights] = json.dumps(config).encode()
            members[f"{root}/data/weights/{config['config']['weight']['path_name']}"] = bomb
        elif kind == "sample inputs":
            members[f"{root}/data/sample_inputs/model.pt"] = bomb
        elif kind == "old weights":
            members[f"{root}/data/weights/model.pt"] = bomb
        elif kind == "object":
            constants = f"{root}/data/constants/model_constants_config.json"
            entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
            members[constants] = json.dumps({"config": {"x": entry}}).encode()
            members[f"{root}/data/constants/opaque_obj_0"] = pickle.dumps(Bomb(marker))
        elif kind == "path outside":
            members[f"{root}/data/weights/../../../evil"] = b"x"
        elif kind == "library":
            members[f"{root}/data/aotinductor/model/evil.so"] = b"\x7fELF"
        elif kind == "expression":
            evil = f"__import__('pathlib').Path('{marker}').touch()"
            members[model] = members[model].replace(b"Symbol('s", f"{evil} or Symbol('s".encode(), 1)
        elif kind == "call":
            evil = f"open('{marker.name}', 'w')"
            members[model] = members[model].replace(b"Symbol('s", f"{evil} + Symbol('s".encode(), 1)
        elif kind == "enumeration":
            found = json.loads(members[model])
            signature = found["graph_module"]["module_call_graph"][0]["signature"]
            context = json.dumps({"__enum__": True, "fqn": "marker:X", "name": "Y"})
            signature["in_spec"] = json.dumps([1, {"type": "builtins.dict", "context": context, "children_spec": []}])
            members[model] = json.dumps(found).encode()
        elif kind == "function":
            members[model] = members[model].replace(b"torch.ops.aten.linear.default", b"torch.serialization.os.system")

    return edit


@pytest.mark.parametrize(
    ("kind", "runs"),
    [
        ("pickled weight", True),
        ("sample inputs", True),
        ("old weights", True),
        ("object", True),
        ("library", False),
        ("path outside", False),
        ("expression", True),
        ("call", True),
        ("enumeration", True),
        ("function", False),
    ],
)
def test_members_that_run_code_are_refused_before_torch_reads_them(
    program: Path, tmp_path: Path, kind: str, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker, buffer = tmp_path / "marker", io.BytesIO()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "marker.py").write_text("open('marker', 'w')\nclass X: pass")
    monkeypatch.syspath_prepend(tmp_path)
    torch.save(Bomb(marker), buffer)
    bad = rewritten(program, _crafted(kind, buffer.getvalue(), marker))
    with pytest.raises(ArtifactError):
        fxprune.load(bad)
    assert not marker.exists()
    if runs:  # the file is as harmful as it is meant to be
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.suppress(Exception):  # torch fails later, or not
                torch.export.load(bad)
        reads_objects = torch.__version__ >= (2, 13)  # before, torch refuses this one itself
        assert marker.exists() or (kind == "object" and not reads_objects)


def test_a_program_inside_a_checkpoint_is_checked_too(path: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(Bomb(tmp_path / "marker"), buffer)

    def edit(members: dict[str, bytes]) -> None:
        inner = path.with_name("inner.pt2")
        inner.write_bytes(members["eval.pt2"])
        members["eval.pt2"] = rewritten(
            inner, _crafted("sample inputs", buffer.getvalue(), tmp_path / "marker")
        ).read_bytes()
        header = json.loads(members["fxprune.json"])
        header["sha256"]["eval.pt2"] = hashlib.sha256(members["eval.pt2"]).hexdigest()
        members["fxprune.json"] = json.dumps(header).encode()

    with pytest.raises(ArtifactError, match="cannot be restored"):
        fxprune.load(rewritten(path, edit))
    assert not (tmp_path / "marker").exists()
