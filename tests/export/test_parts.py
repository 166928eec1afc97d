"""Several modules exported together: each file computes what its module does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

import fxprune
from fxprune.export import Call, Session, time_in_turns, to_onnx_files


def test_each_file_computes_what_its_module_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    shared = nn.Conv2d(3, 4, 3)
    models = [shared, nn.Sequential(shared, nn.BatchNorm2d(4), nn.ReLU()), nn.Flatten()]
    modules = [fxprune.trace(model.eval(), x, dynamic_shapes=None, modes=("eval",)) for model in models]
    paths = to_onnx_files(modules, tmp_path)
    for module, path in zip(modules, paths, strict=True):
        session = Session(path)
        assert len(session.inputs) == len(session.outputs) == 1
        (found,) = session.run(x).values()
        torch.testing.assert_close(found, module(x), rtol=1e-5, atol=1e-5)


def test_files_run_in_turns_until_they_tell_enough(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    modules = [fxprune.trace(nn.Linear(4, n).eval(), x, dynamic_shapes=None, modes=("eval",)) for n in (2, 3)]
    asked: list[tuple[int, ...]] = []

    def is_sure(seconds: np.ndarray) -> bool:
        asked.append(seconds.shape)
        return True

    rounds = time_in_turns(to_onnx_files(modules, tmp_path), [Call((x,), {})] * 2, is_sure)
    assert rounds.shape[1] == 2
    assert (rounds > 0).all()
    assert asked == [rounds.shape] or len(rounds) == 400
