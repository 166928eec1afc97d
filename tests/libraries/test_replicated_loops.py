"""Callbacks in several processes, under DDP and FSDP2: they prune alike, and end with what one process gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fxprune
from tests.libraries import replicated_loops as loops
from tests.processes import in_processes


@pytest.mark.slow
@pytest.mark.usefixtures("_torchvision_operators")
@pytest.mark.parametrize(
    ("loop", "library"),
    [
        (loops.by_lightning, "lightning"),
        (loops.by_trainer, "accelerate"),
        (loops.by_accelerate, "accelerate"),
        (loops.by_accelerate_over_shards, "accelerate"),
        (loops.by_shards, "torch"),
    ],
)
def test_two_processes_prune_clip_and_end_as_one(
    loop: Callable[[str], loops.Found], library: str, tmp_path: Path
) -> None:
    pytest.importorskip(library)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    (want,) = in_processes(1, loop, str(tmp_path / "one"))
    for rank, got in enumerate(in_processes(2, loop, str(tmp_path / "two"))):
        on_all = loop in (loops.by_shards, loops.by_accelerate_over_shards)
        assert got["figures"]["files"] == (2 if not rank or on_all else 0)
        assert got["steps"][""] == want["steps"][""] == 4 * loops.EPOCHS
        for what in ("state", "final", "output"):
            assert got[what].keys() == want[what].keys()
            for name, value in want[what].items():
                if name.endswith("_mask"):
                    assert torch.equal(got[what][name], value), name
                assert torch.allclose(got[what][name], value, rtol=0, atol=1e-5), f"{what}: {name}"
        assert 0.4 < got["figures"]["macs"] <= 0.5
    written = fxprune.load(tmp_path / "two" / "model.fxp").state_dict()
    for name, value in want["final"].items():
        assert torch.allclose(written[name], value, rtol=0, atol=1e-5), name
