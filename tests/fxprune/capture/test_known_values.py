"""Integers that never change, in buffers that no state dict holds: forward may read their values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.errors import CaptureError

X = torch.randn(2, 3, 21, generator=torch.Generator().manual_seed(0))


class Padded(nn.Module):
    """A convolution that pads as audio codecs do, by numbers that it holds in tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(3, 8, 4, stride=2), nn.Conv1d(8, 3, 1)
        self.register_buffer("stride", torch.tensor(2), persistent=False)
        self.register_buffer("size", torch.tensor(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        frames = torch.ceil((x.shape[-1] - self.size) / self.stride + 1).to(torch.int64) - 1
        extra = frames * self.stride + self.size - x.shape[-1]
        return self.head(self.conv(F.pad(x, (int(self.size) // 2, int(extra)))))


class InParts(nn.Module):
    """A model that reads parts of given lengths one by one, with the lengths held beside it."""

    def __init__(self, *lengths: int) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5)
        self.register_buffer("lengths", torch.tensor(lengths), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        ends = self.lengths.cumsum(0).tolist()
        parts = torch.split(x.transpose(1, 2), self.lengths.tolist(), dim=1)
        assert ends[-1] == x.shape[-1]
        return torch.cat([self.layer(part).softmax(1) for part in parts], 1)


@pytest.mark.parametrize("model", [Padded(), InParts(4, 7, 10)], ids=["Padded", "InParts"])
def test_integers_in_buffers_are_read_and_the_batch_stays_free(model: nn.Module, tmp_path: Path) -> None:
    model.eval()
    traced = fxprune.trace(model, X, modes=("eval",))
    for x in (X, X[[0, 1, 0]] * 2):
        assert torch.equal(traced(x), model(x))
    if isinstance(model, Padded):
        fxprune.prune.channels(traced, 0.5, round_to=1)
    final = fxprune.finalize(traced)
    fxprune.export.to_onnx(final, tmp_path / "model.onnx")
    assert type(fxprune.write_back(final, model)) is type(model)


class Counting(nn.Module):
    """Does something else at every second call."""

    def __init__(self, kind: str, *, persistent: bool = False) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("calls", torch.tensor(0), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "written":
            self.calls += 1
        elif self.kind == "written through a view":
            self.calls.view(1)[0] = self.calls + 1
        elif self.kind == "assigned":
            self.calls = self.calls + 1
        return x * 2 if int(self.calls) % 2 else x


@pytest.mark.parametrize("kind", ["written", "written through a view", "assigned"])
def test_a_buffer_that_forward_changes_is_no_constant(kind: str) -> None:
    model = Counting(kind)
    with pytest.raises(CaptureError, match=r"data-dependent.*persistent=False"):
        fxprune.trace(model, X, modes=("eval",))
    assert int(model.calls) == 0


def test_a_buffer_of_the_state_dict_is_no_constant() -> None:
    with pytest.raises(CaptureError, match="data-dependent"):
        fxprune.trace(Counting("read", persistent=True), X, modes=("eval",))
    traced = fxprune.trace(Counting("read"), X, modes=("eval",))
    assert torch.equal(traced(X), X)
