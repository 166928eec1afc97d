"""A checkpoint goes into a model of the same architecture alone, and leaves the given one as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import ArgumentTypeError, ArtifactError
from tests.fxprune.checkpoints.twins import X
from tests.networks import Residual, mlp


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: fxprune.trace(m, (X,))], ids=["dense", "traced"])
def test_the_given_model_is_left_as_it_is(path: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(Residual().eval())
    before, objects = copy.deepcopy(model.state_dict()), list(model.parameters())
    loaded = fxprune.load(path, model)
    damaged = path.with_name("bad")
    damaged.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ArtifactError):
        fxprune.load(damaged, model)
    assert not model.training
    assert all(a is b for a, b in zip(model.parameters(), objects, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in loaded.parameters()}
    assert not shared


def test_another_model_is_refused_by_names_and_shapes(path: Path, shrunk: fxprune.TracedModule) -> None:
    with pytest.raises(ArtifactError, match="no parameter .*stem.weight"):
        fxprune.load(path, fxprune.trace(mlp(), (torch.randn(2, 6),)))

    class Wider(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 6)
            self.extra = nn.Parameter(torch.ones(1))

    with pytest.raises(ArtifactError, match=r"do not fit the model: a mask of shape \(5, 8\) for 'head.parametriz"):
        fxprune.load(path, Wider())
    fxprune.save(fxprune.trace(Residual(), (X,)), dense := path.with_name("dense"))
    with pytest.raises(ArtifactError, match="missing in the file: extra") as caught:
        fxprune.load(dense, Wider())
    assert "head.bias is (5,) in the file, (6,) in the model" in str(caught.value)
    del (smaller := Residual()).head.bias
    smaller.head.register_parameter("bias", None)
    with pytest.raises(ArtifactError, match="missing in the model: head.bias"):
        fxprune.load(dense, smaller)
    fxprune.save(shrunk, path)
    with pytest.raises(ArtifactError, match="plan, masks or norms do not fit the model"):
        fxprune.load(path, fxprune.trace(mlp(), (torch.randn(2, 6),)))
    with pytest.raises(ArtifactError, match="is torch.float32 in the file and torch.float64 in the model"):
        fxprune.load(path, Residual().double())
    with pytest.raises(ArtifactError, match=r"captured in \['eval', 'train'\] and \['eval'\]"):
        fxprune.load(path, fxprune.trace(Residual(), (X,), modes=("eval",)))
    with pytest.raises(ArgumentTypeError, match="into, got dict"):
        fxprune.load(path, {})  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="got Residual"):
        fxprune.save(Residual(), path)  # type: ignore[arg-type]


@pytest.mark.parametrize("carried", [False, True])
def test_code_is_generated_as_often_for_many_layers_as_for_few(
    tmp_path: Path, carried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generated: list[int] = []
    recompile = fxprune.TracedModule.recompile
    monkeypatch.setattr(fxprune.TracedModule, "recompile", lambda self: (generated.append(1), recompile(self))[1])
    counts = []
    for layers in (2, 6):
        dense = fxprune.trace(nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers))), (torch.randn(2, 3),))
        masked = fxprune.prune.l1_unstructured(copy.deepcopy(dense), "*.weight", amount=0.5)
        stored, given = (fxprune.finalize(masked, shrink=False), masked) if carried else (masked, dense)
        fxprune.save(stored, tmp_path / "m", programs=False)
        generated.clear()
        loaded = fxprune.load(tmp_path / "m", given)
        counts.append(len(generated))
        assert fxprune.prune.is_pruned(loaded) is not carried
        assert loaded.state_dict().keys() == stored.state_dict().keys()
    assert counts[0] == counts[1]
