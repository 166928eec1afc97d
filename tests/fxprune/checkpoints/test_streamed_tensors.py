"""What is streamed is a safetensors file, and nothing of the size of the tensors is held beside them."""

from __future__ import annotations

import hashlib
import tracemalloc
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import fxprune
from fxprune.checkpoints.streamed_tensors import StreamedTensors

DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8,
    torch.bool, torch.complex64,
)  # fmt: skip


def test_safetensors_reads_what_is_streamed() -> None:
    tensors = {f"{dtype}": torch.randn(3, 5).mul(3).to(dtype) for dtype in DTYPES}
    tensors |= {"empty": torch.zeros(0, 4), "single": torch.tensor(2.5), 'a "quoted" näme': torch.arange(7)}
    streamed = StreamedTensors.of(tensors)
    content = b"".join(bytes(part) for part in streamed.parts())
    assert len(content) == streamed.size
    assert hashlib.sha256(content).hexdigest() == streamed.sha256()
    read = safetensors.torch.load(content)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_values_start_at_multiples_of_their_size() -> None:
    tensors = {"a": torch.ones(3, dtype=torch.int8), "b": torch.ones(1, dtype=torch.float64), "c": torch.ones(1)}
    streamed = StreamedTensors.of(tensors)
    assert [tensor.element_size() for tensor in streamed.tensors] == [8, 4, 1]
    assert len(streamed.head) % 8 == 0


def test_a_dtype_that_safetensors_lacks_is_refused() -> None:
    with pytest.raises(KeyError):
        StreamedTensors.of({"x": torch.zeros(1, dtype=torch.complex128)})


def test_save_holds_no_copy_of_the_tensors(tmp_path: Path) -> None:
    traced = fxprune.trace(nn.Linear(1500, 1500), (torch.randn(2, 1500),), modes=("eval",))
    size = 4 * 1500 * 1500
    fxprune.save(traced, tmp_path / "first.fxp")  # imports
    tracemalloc.start()  # bytes of Python, as whole files in memory are
    fxprune.save(traced, tmp_path / "model.fxp")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 4
    assert (tmp_path / "model.fxp").stat().st_size > size
    assert torch.equal(fxprune.load(tmp_path / "model.fxp").get_parameter("weight"), traced.get_parameter("weight"))


def test_parameters_that_share_memory_and_have_other_layouts_come_back(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[1].bias = nn.Parameter(torch.arange(8.0)[::2])
    traced = fxprune.trace(model, (torch.randn(2, 4),), modes=("eval",))
    fxprune.save(traced, tmp_path / "model.fxp")
    again = fxprune.load(tmp_path / "model.fxp")
    x = torch.randn(3, 4)
    assert torch.equal(again(x), model(x))
    assert again.get_parameter("0.weight") is again.get_parameter("1.weight")
