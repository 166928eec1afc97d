"""Files of every format there has been still load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fxprune
from fxprune.checkpoints.header import FORMAT

# By format, a file that the first version with it wrote: `nn.Linear(3, 2)` in eval mode, its weight 1 to 6, its bias
# 10 and 20, with the mask [[1, 0, 1], [0, 1, 1]].
FILES = {1: Path(__file__).with_name("data") / "format_1.fxp"}
X = torch.tensor([[1.0, 10.0, 100.0], [0.5, 0.25, 2.0], [0.0, 0.0, 0.0]])
OUTPUTS = [[311.0, 670.0], [16.5, 33.25], [10.0, 20.0]]  # 1 x + 3 z + 10 and 5 y + 6 z + 20


def test_there_is_a_file_of_the_present_format() -> None:
    assert max(FILES) == FORMAT


@pytest.mark.parametrize("version", FILES)
@pytest.mark.parametrize("with_model", [False, True])
def test_a_file_of_each_format_still_loads(version: int, with_model: bool) -> None:
    loaded = fxprune.load(FILES[version], nn.Linear(3, 2) if with_model else None)
    assert loaded(X).tolist() == OUTPUTS
    assert fxprune.prune.is_pruned(loaded, "weight")
    assert loaded.weight_orig.tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    assert fxprune.finalize(loaded)(X).tolist() == OUTPUTS
